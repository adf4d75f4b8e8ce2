//! Which devices `mdadm --assemble --scan` looks at.
//!
//! Source: `mdadm.conf(5)`. Without a line `DEVICE` it looks at every block device. `POLICY path=… auto=no` does not keep it from
//! one (tried with 4.2): without a line `AUTO`, everything is told `yes`, and one `yes` is enough.

use std::fs;
use std::path::Path;

use regex::Regex;

/// The text of all configuration files below `etc`, in the order in which mdadm reads them.
pub fn configuration(etc: &Path) -> String {
    let mut text = String::new();
    for (file, folder) in [("mdadm/mdadm.conf", "mdadm/mdadm.conf.d"), ("mdadm.conf", "mdadm.conf.d")] {
        let fragments = fs::read_dir(etc.join(folder)).into_iter().flatten().flatten();
        let mut paths: Vec<_> = fragments.map(|entry| entry.path()).collect();
        paths.retain(|path| path.extension().is_some_and(|extension| extension == "conf"));
        paths.sort();
        paths.insert(0, etc.join(file));
        for path in paths {
            text.push_str(&fs::read_to_string(path).unwrap_or_default());
            text.push('\n');
        }
    }
    text
}

/// Those of `nodes` that it would look at.
pub fn looks_at<'a>(configuration: &str, nodes: &[&'a str]) -> Vec<&'a str> {
    let lines = lines(configuration);
    let of = |keyword: &str| {
        let found =
            lines.iter().filter(|line| line[0].len() >= 3 && keyword.starts_with(&line[0].to_lowercase()));
        found.map(|line| &line[1..]).collect::<Vec<_>>()
    };
    // The first line decides, and the first word that speaks of all.
    let auto = of("auto").first().and_then(|words| words.iter().find(|word| word.ends_with("all")).cloned());
    if auto.as_deref() == Some("-all") {
        return Vec::new();
    }
    let devices: Vec<String> = of("device").concat();
    let looked_at = |node: &&&str| {
        devices.is_empty()
            || devices.iter().any(|word| word.eq_ignore_ascii_case("partitions") || matches(word, node))
    };
    nodes.iter().filter(looked_at).copied().collect()
}

/// Words of each line; one that begins with a space goes on with the line before it.
fn lines(text: &str) -> Vec<Vec<String>> {
    let mut lines: Vec<Vec<String>> = Vec::new();
    for line in text.lines() {
        let words = line.split_whitespace().take_while(|word| !word.starts_with('#')).map(str::to_owned);
        match lines.last_mut() {
            Some(last) if line.starts_with([' ', '\t']) => last.extend(words),
            _ => lines.push(words.collect()),
        }
    }
    lines.retain(|line| !line.is_empty());
    lines
}

/// A pattern of a shell; one that is not understood matches.
fn matches(glob: &str, node: &str) -> bool {
    let mut pattern = String::from("^");
    for letter in glob.chars() {
        match letter {
            '*' => pattern.push_str("[^/]*"),
            '?' => pattern.push_str("[^/]"),
            '[' | ']' | '-' => pattern.push(letter),
            '!' => pattern.push('^'),
            other => pattern.push_str(&regex::escape(other.encode_utf8(&mut [0; 4]))),
        }
    }
    pattern.push('$');
    Regex::new(&pattern).map_or(true, |regex| regex.is_match(node))
}

#[cfg(test)]
mod tests {
    use super::*;

    const NODES: [&str; 3] = ["/dev/dm-7", "/dev/nbd0", "/dev/loop0"];

    #[test]
    fn without_a_line_for_devices_it_looks_at_all() {
        assert_eq!(looks_at("HOMEHOST <system>\n#DEVICE /dev/sd*\n", &NODES), NODES);
        assert_eq!(looks_at("DEVICE partitions containers\n", &NODES), NODES);
        assert!(looks_at("DEVICE /dev/sd* containers # and no more\n", &NODES).is_empty());
        assert_eq!(looks_at("dev /dev/sd*\n  /dev/dm-[0-9]\nDEVICE /dev/n?d0", &NODES), NODES[..2]);
        assert_eq!(looks_at("DEVICE /dev/[!d]*", &NODES), NODES[1..]);
        assert_eq!(looks_at("DEVICE /dev/[", &NODES), NODES, "not understood");
    }

    #[test]
    fn nothing_is_assembled_by_itself_where_that_is_switched_off() {
        assert!(looks_at("AUTO -all\n", &NODES).is_empty());
        assert!(looks_at("AUTO +1.x homehost -all\nAUTO +all", &NODES).is_empty());
        assert_eq!(looks_at("AUTO +all\nAUTO -all\n", &NODES), NODES, "the first line counts");
    }
}
