//! Tables as kubectl prints them.

use std::fmt;

/// Spaces between two columns.
const GAP: usize = 3;

/// Rows of text under headings. Empty cells are shown as `-`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table<const COLUMNS: usize> {
    rows: Vec<[String; COLUMNS]>,
}

impl<const COLUMNS: usize> Table<COLUMNS> {
    /// No rows yet.
    pub fn new(headings: [&str; COLUMNS]) -> Self {
        Self { rows: vec![headings.map(str::to_owned)] }
    }

    /// One more row. Control characters become spaces: messages may quote what a stranger's server said.
    pub fn push(&mut self, cells: [String; COLUMNS]) {
        self.rows.push(cells.map(|cell| {
            let cell: String = cell.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
            if cell.is_empty() { "-".to_owned() } else { cell }
        }));
    }
}

impl<const COLUMNS: usize> fmt::Display for Table<COLUMNS> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut widths = [0; COLUMNS];
        for row in &self.rows {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = cell.chars().count().max(*width);
            }
        }
        for row in &self.rows {
            let mut line = String::new();
            for (width, cell) in widths.iter().zip(row) {
                line.push_str(cell);
                line.extend(std::iter::repeat_n(' ', width + GAP - cell.chars().count()));
            }
            writeln!(f, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell_and_lines_end_with_text() {
        let mut table = Table::new(["NAME", "SIZE", "MESSAGE"]);
        table.push(["a-long-name".to_owned(), String::new(), "ü\u{1b}[2J\nx".to_owned()]);
        table.push(["b".to_owned(), "1.5 GiB".to_owned(), String::new()]);
        assert_eq!(
            table.to_string(),
            "NAME          SIZE      MESSAGE\n\
             a-long-name   -         ü [2J x\n\
             b             1.5 GiB   -\n"
        );
    }
}
