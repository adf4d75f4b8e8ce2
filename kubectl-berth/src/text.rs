//! Text for people: lines that fit a terminal of 80 columns, and spans of time.

use std::fmt::Write as _;

/// The width that everything but tables fits in.
const WIDTH: usize = 80;

/// `text` as lines of at most 80 characters. The first begins with `head`, the others with as many spaces. A word that is
/// longer than a line has one to itself. Control characters become spaces: messages may quote what a stranger's server said.
pub fn wrapped(head: &str, text: &str) -> String {
    let indent = head.chars().count();
    let mut lines = String::new();
    let mut line = head.to_owned();
    let mut is_begun = false;
    for word in text.split(|c: char| c.is_whitespace() || c.is_control()).filter(|word| !word.is_empty()) {
        let length = line.chars().count() + 1 + word.chars().count();
        if is_begun && length > WIDTH {
            let _ = writeln!(lines, "{line}");
            line = " ".repeat(indent);
            is_begun = false;
        }
        if is_begun {
            line.push(' ');
        }
        line.push_str(word);
        is_begun = true;
    }
    lines + line.trim_end() + "\n"
}

/// A labelled value, the label in a column of its own.
pub fn fact(label: &str, text: &str) -> String {
    wrapped(&format!("  {label:<11}"), text)
}

/// A span of time in its two largest units.
pub fn span(millis: u64) -> String {
    let seconds = millis / 1000;
    let (large, small) = match seconds {
        0..60 => return format!("{seconds} s"),
        60..3600 => ((seconds / 60, "min"), (seconds % 60, "s")),
        3600..86_400 => ((seconds / 3600, "h"), (seconds % 3600 / 60, "min")),
        _ => ((seconds / 86_400, "d"), (seconds % 86_400 / 3600, "h")),
    };
    match small {
        (0, _) => format!("{} {}", large.0, large.1),
        (count, unit) => format!("{} {} {count} {unit}", large.0, large.1),
    }
}

/// `count` things, in the singular if it is one.
pub fn count(count: usize, thing: &str) -> String {
    let plural = if count == 1 { "" } else { "s" };
    format!("{count} {thing}{plural}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_fit_and_continue_below_their_beginning() {
        let text = wrapped("  why        ", &"word ".repeat(30));
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 3);
        assert!(lines.iter().all(|line| line.chars().count() <= WIDTH), "{text}");
        assert!(lines[1].starts_with(&(" ".repeat(13) + "word")), "{text}");
        assert_eq!(wrapped("a ", "b\u{1b}[2J\n c"), "a b [2J c\n");
        assert_eq!(wrapped("a ", ""), "a\n");
        let long = "x".repeat(100);
        assert_eq!(wrapped("", &format!("a {long} b")), format!("a\n{long}\nb\n"));
    }

    #[test]
    fn spans_have_their_two_largest_units() {
        let all = [999, 61_000, 3_600_000, 5_400_000, 90_000_000].map(span);
        assert_eq!(all, ["0 s", "1 min 1 s", "1 h", "1 h 30 min", "1 d 1 h"]);
    }
}
