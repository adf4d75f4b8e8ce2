//! `berth-node man` and `berth-node completions`: pages and completions, made from the command line itself.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use clap::{Args, CommandFactory as _};
use clap_complete::Shell;
use thiserror::Error;

use crate::args::Cli;

/// Flags of `berth-node man`.
#[derive(Clone, Debug, Args)]
pub struct ManArgs {
    /// Where the pages are written, as `berth-node.1`, `berth-node-pool.1`, `berth-node-pool-create.1` and so on.
    #[arg(long, value_name = "DIR")]
    pub dir: PathBuf,
}

/// Flags of `berth-node completions`.
#[derive(Clone, Debug, Args)]
pub struct CompletionsArgs {
    /// The shell.
    pub shell: Shell,
}

/// Why there are no pages.
#[derive(Debug, Error)]
#[error("failed to write man pages to {}", dir.display())]
pub struct ManError {
    /// The directory.
    pub dir: PathBuf,
    /// Why.
    pub source: io::Error,
}

/// Writes a page for the program and for each of its commands.
///
/// # Errors
/// If one cannot be written.
pub fn man(dir: &Path) -> Result<(), ManError> {
    let failed = |source| ManError { dir: dir.to_owned(), source };
    fs::create_dir_all(dir).map_err(failed)?;
    clap_mangen::generate_to(Cli::command(), dir).map_err(failed)
}

/// Prints the completions for a shell.
///
/// # Errors
/// If standard output is closed.
pub fn completions(shell: Shell) -> io::Result<()> {
    let mut command = Cli::command();
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut command, "berth-node", &mut text);
    io::Write::write_all(&mut io::stdout().lock(), &text)
}

#[cfg(test)]
mod tests {
    use clap::Command;

    use super::*;

    /// Every command with its name as a page has it, itself first.
    fn all(command: &Command, name: &str) -> Vec<(String, Command)> {
        let mut found = vec![(name.to_owned(), command.clone())];
        let shown = |child: &&Command| child.get_name() != "help" && !child.is_hide_set();
        for child in command.get_subcommands().filter(shown) {
            found.extend(all(child, &format!("{name}-{}", child.get_name())));
        }
        found
    }

    #[test]
    fn each_command_has_a_page_and_help_that_explain_all_its_arguments() {
        let dir = tempfile::tempdir().unwrap();
        man(&dir.path().join("new")).unwrap();
        let mut root = Cli::command().disable_help_subcommand(true);
        root.build();
        let commands = all(&root, "berth-node");
        assert!(commands.len() > 25, "{}", commands.len());
        for (name, mut command) in commands {
            let page = fs::read_to_string(dir.path().join(format!("new/{name}.1"))).expect(&name);
            let page = page.replace("\\-", "-");
            let help = command.render_long_help().to_string();
            assert!(command.get_about().is_some(), "{name}");
            for argument in command.get_arguments() {
                let id = argument.get_id().as_str();
                let shown = match argument.get_long() {
                    Some(long) => format!("--{long}"),
                    None => argument.get_value_names().and_then(|names| names.first()).unwrap().to_string(),
                };
                assert!(help.contains(&shown), "{name} --help does not show {shown}");
                assert!(page.contains(&shown), "{name}.1 does not show {shown}");
                assert!(argument.get_help().is_some_and(|help| !help.to_string().is_empty()), "{name}: {id}");
            }
        }
    }

    #[test]
    fn every_shell_has_completions() {
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            let mut text = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "berth-node", &mut text);
            let text = String::from_utf8(text).unwrap();
            assert!(text.contains("introduce") && text.contains("with-contents"), "{shell}");
        }
    }
}
