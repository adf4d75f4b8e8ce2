//! What LVM's filters do with a name. Pure.
//!
//! Source: `lvm.conf(5)`, and `lib/filters/filter-regex.c` of LVM2: the first pattern that matches a name decides, and a name
//! that none matches is accepted. Both filters apply.

use regex::Regex;

/// The settings that decide what LVM sees.
#[derive(Debug, Default)]
pub struct Filters {
    lists: Vec<Vec<Pattern>>,
    use_devices_file: bool,
    devices_file: String,
}

#[derive(Debug)]
struct Pattern {
    accept: bool,
    /// `None` for a pattern that is not understood: it counts as one that accepts everything.
    regex: Option<Regex>,
}

impl Filters {
    /// Reads what `lvmconfig --typeconfig full devices` prints.
    pub fn parse(text: &str) -> Self {
        let mut found = Self { devices_file: "system.devices".to_owned(), ..Self::default() };
        for line in text.lines() {
            let Some((key, value)) = line.trim().split_once('=') else { continue };
            match key.trim() {
                "filter" | "global_filter" => {
                    found.lists.push(quoted(value).map(|text| Pattern::parse(&text)).collect());
                }
                "use_devicesfile" => found.use_devices_file = value.trim() == "1",
                "devicesfile" => found.devices_file = quoted(value).next().unwrap_or_default(),
                _ => {}
            }
        }
        found
    }

    /// True if a file lists what LVM sees; the filters are not used then, if the file is there.
    pub fn uses_devices_file(&self) -> bool {
        self.use_devices_file
    }

    /// The name of that file.
    pub fn devices_file(&self) -> &str {
        &self.devices_file
    }
}

impl Pattern {
    /// `a` or `r`, any character, the pattern, and that character again.
    fn parse(text: &str) -> Self {
        let mut letters = text.chars();
        let (kind, delimiter) = (letters.next(), letters.next());
        let inner = letters.as_str();
        let closed = delimiter.and_then(|delimiter| {
            inner.strip_suffix(match delimiter {
                '(' => ')',
                '[' => ']',
                '{' => '}',
                other => other,
            })
        });
        match (kind, closed) {
            (Some(kind @ ('a' | 'r')), Some(inner)) => {
                let regex = Regex::new(inner).ok();
                Self { accept: kind == 'a' || regex.is_none(), regex }
            }
            _ => Self { accept: true, regex: None },
        }
    }
}

/// The texts in quotes of a value.
fn quoted(value: &str) -> impl Iterator<Item = String> {
    value.split('"').skip(1).step_by(2).map(|text| text.replace("\\\\", "\\"))
}

/// True if LVM leaves a device alone that has this name, and no name that is accepted.
pub fn rejects(filters: &Filters, name: &str) -> bool {
    filters.lists.iter().any(|list| {
        let first =
            list.iter().find(|pattern| pattern.regex.as_ref().is_none_or(|regex| regex.is_match(name)));
        first.is_some_and(|pattern| !pattern.accept)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const OURS: &str = "/dev/mapper/berth-0f3c9a1e-images";

    fn rejected(lines: &str) -> bool {
        rejects(&Filters::parse(lines), OURS)
    }

    #[test]
    fn the_first_pattern_that_matches_decides() {
        assert!(!rejected("") && !rejected("\tfilter=[\"a|.*|\"]\n\tglobal_filter=[\"a|.*|\"]"));
        assert!(rejected("filter=\"r|.*|\""), "one alone is no list");
        assert!(rejected("\tglobal_filter=[\"r|^/dev/mapper/berth-|\",\"a|.*|\"]"));
        assert!(!rejected("filter=[\"a|.*|\",\"r|^/dev/mapper/berth-|\"]"), "too late");
        assert!(rejected("filter=[\"a|^/dev/sd|\",\"r|.*|\"]"), "only some are accepted");
        assert!(rejected("filter=[\"a|.*|\"]\nglobal_filter=[\"r/berth/\"]"), "each of both counts");
        assert!(
            rejected("filter=[\"r{mapper/berth-}\"]") && !rejected("filter=[\"r|^/dev/mapper/berth$|\"]")
        );
        assert!(rejected("filter = [ \"r|^/dev/mapper/berth\\\\-|\" ]"), "escaped as LVM prints it");
    }

    #[test]
    fn what_is_not_understood_rejects_nothing() {
        for odd in ["filter=[\"x|.*|\"]", "filter=[\"r|(|\",\"r|.*|\"]", "filter=[\"r\"]", "filter=[r]"] {
            assert!(!rejected(odd), "{odd}");
        }
    }

    #[test]
    fn a_devices_file_is_found() {
        let filters = Filters::parse("\tuse_devicesfile=1\n\tdevicesfile=\"mine.devices\"\n");
        assert!(filters.uses_devices_file());
        assert_eq!(filters.devices_file(), "mine.devices");
        assert!(!Filters::parse("use_devicesfile=0").uses_devices_file());
    }
}
