//! A client as the kernel is one: it negotiates by `NBD_OPT_GO`, and takes answers that are not chunks.

use std::io::{self, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use berth_device::nbd::{ExportFlags, handshake};

/// One connection with one request at a time.
pub struct Client {
    pub stream: UnixStream,
}

impl Client {
    pub fn connect(socket: &Path) -> Self {
        let (stream, export) = handshake(socket, "", Duration::from_secs(10)).unwrap();
        assert!(export.flags.has(ExportFlags::READ_ONLY.and(ExportFlags::MULTI_CONN)), "{}", export.flags);
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        Self { stream }
    }

    /// Sends a request, and returns at once.
    pub fn ask(&mut self, kind: u16, offset: u64, len: u32) -> io::Result<()> {
        let head = [
            &0x2560_9513_u32.to_be_bytes()[..],
            &0_u16.to_be_bytes(),
            &kind.to_be_bytes(),
            &77_u64.to_be_bytes(),
            &offset.to_be_bytes(),
            &len.to_be_bytes(),
        ];
        self.stream.write_all(&head.concat())
    }

    /// The error of the next answer, 0 for none.
    pub fn answer(&mut self) -> io::Result<u32> {
        let mut head = [0; 16];
        self.stream.read_exact(&mut head)?;
        assert_eq!((&head[..4], &head[8..]), (&0x6744_6698_u32.to_be_bytes()[..], &77_u64.to_be_bytes()[..]));
        Ok(u32::from_be_bytes(head[4..8].try_into().unwrap()))
    }

    /// Reads; the error is the protocol's number.
    pub fn read(&mut self, offset: u64, len: u32) -> Result<Vec<u8>, u32> {
        self.ask(0, offset, len).unwrap();
        match self.answer().unwrap() {
            0 => {
                let mut data = vec![0; len as usize];
                self.stream.read_exact(&mut data).unwrap();
                Ok(data)
            }
            errno => Err(errno),
        }
    }
}
