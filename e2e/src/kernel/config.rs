//! What the guest is told in files: its configuration and its commands, both read by a shell.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

/// What the guest's first process reads before anything else.
#[derive(Debug)]
pub struct Config<'a> {
    pub host_name: &'a str,
    pub overlay: bool,
    pub tmpfs: &'a [PathBuf],
    pub shares: &'a [PathBuf],
    pub modules: &'a [String],
    pub module_root: &'a Path,
    /// Its own address with the length of the prefix, and the way out.
    pub network: Option<(String, String)>,
}

impl Config<'_> {
    /// The file `config` of `e2e/kernel/init`.
    pub fn to_script(&self) -> Vec<u8> {
        let (address, gateway) = self.network.clone().unwrap_or_default();
        let mut script = Vec::new();
        let mut set = |name: &str, value: &[u8]| {
            script.extend_from_slice(name.as_bytes());
            script.push(b'=');
            script.extend_from_slice(value);
            script.push(b'\n');
        };
        set("HOST_NAME", &quoted(self.host_name));
        set("OVERLAY", if self.overlay { b"1" } else { b"0" });
        set("TMPFS", &list(self.tmpfs));
        set("SHARES", &list(self.shares));
        set("MODULES", &list(self.modules));
        set("MODULE_ROOT", &quoted(self.module_root));
        set("ADDRESS", &quoted(&address));
        set("GATEWAY", &quoted(&gateway));
        script
    }
}

/// The file `command` of a job: working folder, environment, and the program in place of the shell.
pub fn job_script(folder: &Path, env: &[(OsString, OsString)], words: &[OsString]) -> Vec<u8> {
    let mut script = [b"cd ".as_slice(), &quoted(folder), b" || exit 126\n"].concat();
    for (name, value) in env {
        script
            .extend_from_slice(&[b"export ", name.as_encoded_bytes(), b"=", &quoted(value), b"\n"].concat());
    }
    script.extend_from_slice(b"exec --");
    for word in words {
        script.push(b' ');
        script.extend_from_slice(&quoted(word));
    }
    script.push(b'\n');
    script
}

fn list<T: AsRef<OsStr>>(items: &[T]) -> Vec<u8> {
    let items: Vec<Vec<u8>> = items.iter().map(quoted).collect();
    [b"(".as_slice(), &items.join(&b' '), b")"].concat()
}

/// One word for a shell, whatever is in it.
fn quoted<T: AsRef<OsStr>>(word: T) -> Vec<u8> {
    let mut quoted = vec![b'\''];
    for byte in word.as_ref().as_encoded_bytes() {
        match byte {
            b'\'' => quoted.extend_from_slice(br"'\''"),
            other => quoted.push(*other),
        }
    }
    quoted.push(b'\'');
    quoted
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStringExt as _;
    use std::process::Command;

    use super::*;

    fn bash(script: &[u8]) -> Vec<u8> {
        let script = OsString::from_vec(script.to_vec());
        Command::new("bash").arg("-uc").arg(script).output().unwrap().stdout
    }

    #[test]
    fn a_command_arrives_word_by_word_with_its_environment_and_folder() {
        let words =
            ["bash", "-c", r#"printf '<%s>' "$@" "$ODD" "$PWD""#, "", "it's", "a\nb $HOME `x` \\", ""];
        let mut words = words.map(OsString::from).to_vec();
        words.push(OsString::from_vec(vec![0xff, b' ']));
        let env = [(OsString::from("ODD"), OsString::from("'\" *"))];
        let said = bash(&job_script(Path::new("/usr"), &env, &words));
        let wanted = [b"<it's><a\nb $HOME `x` \\><><".as_slice(), &[0xff], b" ><'\" *></usr>"].concat();
        assert_eq!(said, wanted, "{}", String::from_utf8_lossy(&said));
    }

    #[test]
    fn a_configuration_is_read_back() {
        let config = Config {
            host_name: "one",
            overlay: true,
            tmpfs: &["/tmp".into(), "/a b".into()],
            shares: &[],
            modules: &["loop".to_owned()],
            module_root: Path::new("/m"),
            network: Some(("10.0.0.2/24".to_owned(), "10.0.0.1".to_owned())),
        };
        let show = br#"echo "$HOST_NAME $OVERLAY ${#TMPFS[@]} ${TMPFS[1]} ${#SHARES[@]} $MODULES $ADDRESS $GATEWAY""#;
        let said = bash(&[config.to_script(), show.to_vec()].concat());
        assert_eq!(String::from_utf8_lossy(&said), "one 1 2 /a b 0 loop 10.0.0.2/24 10.0.0.1\n");
    }
}
