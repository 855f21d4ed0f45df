//! Aligned columns.

use std::io::{self, Write};

use unicode_width::UnicodeWidthStr;

/// Which side of its column a cell keeps to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Text.
    Left,
    /// Numbers.
    Right,
}

/// Widest that a column is padded to: one monstrous name must not push every row out of sight.
const WIDEST: usize = 96;

/// Rows of cells. The text of a cell is already safe for a terminal.
#[derive(Debug)]
pub struct Table {
    sides: Vec<Side>,
    rows: Vec<(Emphasis, Vec<String>)>,
}

/// How a row stands out on a terminal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Emphasis {
    /// Not at all.
    Plain,
    /// The row is a heading.
    Heading,
    /// The row's first cell names a group.
    Group,
}

impl Table {
    /// A table whose first row is `heading`: a title and a side for each column.
    pub fn new(heading: &[(&str, Side)]) -> Self {
        let titles = heading.iter().map(|(title, _)| (*title).to_owned());
        let rows = vec![(Emphasis::Heading, titles.collect())];
        let sides = heading.iter().map(|(_, side)| *side).collect();
        Table { sides, rows }
    }

    /// Adds a row.
    pub fn row(&mut self, cells: Vec<String>) {
        self.rows.push((Emphasis::Plain, cells));
    }

    /// Adds a row that names a group.
    pub fn group(&mut self, cells: Vec<String>) {
        self.rows.push((Emphasis::Group, cells));
    }

    /// Writes the rows; `colour` emphasises headings and groups.
    ///
    /// # Errors
    /// What writing said.
    pub fn write(&self, out: &mut dyn Write, colour: bool) -> io::Result<()> {
        let widths = self.widths();
        let mut text = String::new();
        for (emphasis, cells) in &self.rows {
            text.clear();
            for (i, cell) in cells.iter().enumerate() {
                let (width, side) = (widths[i], self.sides[i]);
                let gap = width.saturating_sub(cell.width());
                let (before, after) = match side {
                    Side::Left => (0, gap),
                    Side::Right => (gap, 0),
                };
                let (on, off) = match (colour, emphasis, i) {
                    (true, Emphasis::Heading, _) => ("\x1b[2m", "\x1b[0m"),
                    (true, Emphasis::Group, 0) => ("\x1b[1m", "\x1b[0m"),
                    _ => ("", ""),
                };
                let gutter = if i > 0 { "  " } else { "" };
                text.push_str(gutter);
                text.extend(std::iter::repeat_n(' ', before));
                text.push_str(on);
                text.push_str(cell);
                text.push_str(off);
                text.extend(std::iter::repeat_n(' ', after));
            }
            writeln!(out, "{}", text.trim_end_matches(' '))?;
        }
        Ok(())
    }

    fn widths(&self) -> Vec<usize> {
        let mut widths = vec![0; self.sides.len()];
        for (_, cells) in &self.rows {
            for (width, cell) in widths.iter_mut().zip(cells) {
                *width = (*width).max(cell.width().min(WIDEST));
            }
        }
        widths
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(table: &Table, colour: bool) -> String {
        let mut out = Vec::new();
        table.write(&mut out, colour).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn columns_are_aligned_and_lines_end_where_their_text_ends() {
        let mut table = Table::new(&[
            ("name", Side::Left),
            ("size", Side::Right),
            ("x", Side::Left),
        ]);
        table.row(vec!["重み".into(), "7".into(), String::new()]);
        table.group(vec!["b".into(), "12345".into(), "y".into()]);
        assert_eq!(
            lines(&table, false),
            "name   size  x\n重み      7\nb     12345  y\n"
        );
        assert!(lines(&table, true).contains("\x1b[1mb\x1b[0m     12345"));
    }

    #[test]
    fn one_long_cell_does_not_widen_the_rest() {
        let mut table = Table::new(&[("name", Side::Left), ("n", Side::Right)]);
        table.row(vec!["x".repeat(5000), "1".into()]);
        table.row(vec!["y".into(), "2".into()]);
        let text = lines(&table, false);
        assert_eq!(text.lines().last().unwrap().len(), WIDEST + 3);
    }
}
