//! `kubectl berth man` and `kubectl berth completions`: pages and completions, made from the command line itself.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use clap::{Command, CommandFactory as _, ValueEnum};
use clap_complete::Shell;
use thiserror::Error;

use crate::args::Args;

/// The script by which kubectl completes `kubectl berth …`: a file of this name in the search path.
const PLUGIN_COMPLETION: &str = "#!/bin/sh\n# Save as `kubectl_complete-berth` in a folder of PATH, executable.\n\
                                 exec kubectl-berth __complete -- \"$@\"\n";
/// What ends an answer to kubectl: no file names are offered beside it.
const NO_FILES: &str = ":4";

/// Flags of `kubectl berth man`.
#[derive(Clone, Debug, clap::Args)]
pub struct ManArgs {
    /// Where the pages are written, as `kubectl-berth.1`, `kubectl-berth-status.1` and so on.
    #[arg(long, value_name = "DIR")]
    pub dir: PathBuf,
}

/// Flags of `kubectl berth completions`.
#[derive(Clone, Debug, clap::Args)]
pub struct CompletionsArgs {
    /// For what.
    pub shell: CompletionFor,
}

/// What completions are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum CompletionFor {
    /// The command `kubectl-berth` in bash.
    Bash,
    /// The command `kubectl-berth` in zsh.
    Zsh,
    /// The command `kubectl-berth` in fish.
    Fish,
    /// `kubectl berth`, in whichever shell kubectl itself is completed: the script `kubectl_complete-berth`.
    Kubectl,
}

/// What kubectl asks to be completed.
#[derive(Clone, Debug, clap::Args)]
pub struct CompleteArgs {
    /// The words after `kubectl berth`; the last is the one to complete.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub words: Vec<OsString>,
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
    clap_mangen::generate_to(Args::command(), dir).map_err(failed)
}

/// The completions.
pub fn completions(of: CompletionFor) -> String {
    let shell = match of {
        CompletionFor::Bash => Shell::Bash,
        CompletionFor::Zsh => Shell::Zsh,
        CompletionFor::Fish => Shell::Fish,
        CompletionFor::Kubectl => return PLUGIN_COMPLETION.to_owned(),
    };
    let mut text = Vec::new();
    // The shells complete the program by its own name; `kubectl berth` is completed by kubectl.
    clap_complete::generate(
        shell,
        &mut Args::command().bin_name("kubectl-berth"),
        "kubectl-berth",
        &mut text,
    );
    String::from_utf8_lossy(&text).into_owned()
}

/// The answer to kubectl: one candidate a line, with its meaning after a tab, and what to do besides.
pub fn complete(words: &[OsString]) -> String {
    let words: Vec<String> = words.iter().map(|word| word.to_string_lossy().into_owned()).collect();
    let (last, before) = words.split_last().map_or(("", &[][..]), |(last, before)| (last.as_str(), before));
    let mut root = Args::command();
    root.build();
    let mut command = &root;
    for word in before {
        command = command.find_subcommand(word).unwrap_or(command);
    }
    let mut lines: Vec<String> = candidates(command, before.last().map_or("", String::as_str), last);
    lines.push(NO_FILES.to_owned());
    lines.join("\n") + "\n"
}

fn candidates(command: &Command, previous: &str, last: &str) -> Vec<String> {
    let by_flag = command.get_arguments().find(|arg| {
        let is_long = arg.get_long().is_some_and(|long| previous.strip_prefix("--") == Some(long));
        let is_short = arg.get_short().is_some_and(|short| previous == format!("-{short}"));
        (is_long || is_short) && arg.get_action().takes_values()
    });
    let values = |arg: &clap::Arg| -> Vec<(String, String)> {
        let values = arg.get_possible_values();
        values.iter().map(|value| (value.get_name().to_owned(), help(value.get_help()))).collect()
    };
    let mut all: Vec<(String, String)> = match by_flag {
        Some(arg) => values(arg),
        None if last.starts_with('-') => flags(command),
        None => {
            let children = command.get_subcommands().filter(|child| !child.is_hide_set());
            let children = children.map(|child| (child.get_name().to_owned(), help(child.get_about())));
            children.chain(command.get_positionals().flat_map(values)).collect()
        }
    };
    all.retain(|(name, _)| name.starts_with(last));
    all.into_iter()
        .map(|(name, help)| if help.is_empty() { name } else { format!("{name}\t{help}") })
        .collect()
}

fn flags(command: &Command) -> Vec<(String, String)> {
    let shown = command.get_arguments().filter(|arg| !arg.is_hide_set());
    shown.filter_map(|arg| Some((format!("--{}", arg.get_long()?), help(arg.get_help())))).collect()
}

/// The first line of an explanation.
fn help(text: Option<&clap::builder::StyledStr>) -> String {
    text.map(|text| text.to_string().lines().next().unwrap_or_default().to_owned()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every command with its name as a page has it, itself first.
    fn all(command: &Command, name: &str) -> Vec<(String, Command)> {
        let mut found = vec![(name.to_owned(), command.clone())];
        for child in command.get_subcommands().filter(|child| !child.is_hide_set()) {
            found.extend(all(child, &format!("{name}-{}", child.get_name())));
        }
        found
    }

    #[test]
    fn each_command_has_a_page_and_help_that_explain_all_its_arguments() {
        let dir = std::env::temp_dir().join(format!("kubectl-berth-man-{}", std::process::id()));
        man(&dir).expect("written");
        let mut root = Args::command().disable_help_subcommand(true);
        root.build();
        let commands = all(&root, "kubectl-berth");
        assert!(commands.len() >= 12, "{}", commands.len());
        for (name, mut command) in commands {
            let page = fs::read_to_string(dir.join(format!("{name}.1"))).expect(&name).replace("\\-", "-");
            let help = command.render_long_help().to_string();
            assert!(command.get_about().is_some(), "{name}");
            for argument in command.get_arguments() {
                let shown = match argument.get_long() {
                    Some(long) => format!("--{long}"),
                    None => argument
                        .get_value_names()
                        .and_then(|names| names.first())
                        .expect("a name")
                        .to_string(),
                };
                assert!(help.contains(&shown), "{name} --help does not show {shown}");
                assert!(page.contains(&shown), "{name}.1 does not show {shown}");
                assert!(
                    argument.get_help().is_some_and(|help| !help.to_string().is_empty()),
                    "{name}: {shown}"
                );
            }
        }
        fs::remove_dir_all(&dir).expect("its own folder");
    }

    #[test]
    fn every_shell_has_completions() {
        for shell in [CompletionFor::Bash, CompletionFor::Zsh, CompletionFor::Fish] {
            let text = completions(shell);
            assert!(text.contains("kubectl-berth") && text.contains("explain"), "{shell:?}");
            assert!(text.contains("system-namespace"), "{shell:?}");
        }
        assert!(completions(CompletionFor::Kubectl).starts_with("#!/bin/sh\n"));
    }

    #[test]
    fn kubectl_is_offered_commands_flags_and_values() {
        let ask = |words: &[&str]| complete(&words.iter().map(OsString::from).collect::<Vec<_>>());
        assert_eq!(
            ask(&["stat"]),
            "status\tShows pools, nodes, imports, transfers and reservations in one table\n:4\n"
        );
        assert_eq!(ask(&["status", "-o", ""]), "table\tFor people\njson\tFor programs\n:4\n");
        assert_eq!(
            ask(&["check", "--look"]),
            "--looks\tHow often to look, one second apart: what concerns several objects is a finding only if it was seen every time\n:4\n"
        );
        assert!(ask(&["completions", ""]).contains("fish\t"));
        assert_eq!(ask(&["__com"]), ":4\n", "what is only for kubectl is not offered");
    }
}
