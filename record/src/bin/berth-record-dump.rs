//! Prints a record, good or damaged, as JSON. Exit status: 0 sound, 1 with problems, 2 unreadable.

use std::io::Write as _;
use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    let args: Vec<_> = std::env::args_os().skip(1).collect();
    let [path] = args.as_slice() else {
        eprintln!("usage: berth-record-dump FILE");
        return ExitCode::from(2);
    };
    // What the store says when it meets damage is among the problems shown.
    std::panic::set_hook(Box::new(|_| {}));
    let shown = match berth_record::dump(Path::new(path), &std::env::temp_dir()) {
        Ok(shown) => shown,
        Err(e) => {
            eprintln!("failed to read record {}: {e}", Path::new(path).display());
            return ExitCode::from(2);
        }
    };
    let sound = shown["problems"].as_array().is_some_and(Vec::is_empty);
    if writeln!(std::io::stdout(), "{shown:#}").is_err() {
        return ExitCode::from(2);
    }
    ExitCode::from(u8::from(!sound))
}
