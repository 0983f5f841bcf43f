//! Tables, key-value lists, JSON and questions.

use std::io::{self, IsTerminal, Write};

use serde_json::Value;
use types::ByteSize;

use crate::failure::{Failure, Outcome};

/// Writes to standard output. A reader that has gone (`weft ... | head`) ends the process as SIGPIPE would: it
/// wants no more, which is no failure.
pub fn print(text: &str) {
    let mut out = io::stdout().lock();
    if let Err(error) = out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        if error.kind() != io::ErrorKind::BrokenPipe {
            eprintln!("weft: cannot write the output: {error}");
        }
        std::process::exit(i32::from(error.kind() != io::ErrorKind::BrokenPipe));
    }
}

/// Writes a line to standard output.
pub fn line(text: &str) {
    print(&format!("{text}\n"));
}

/// Writes the API's JSON.
pub fn json(value: &Value) {
    line(&serde_json::to_string_pretty(value).expect("a value is printable"));
}

/// How a column is laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Align {
    /// Text.
    Left,
    /// Numbers and sizes.
    Right,
}

/// Rows under headings, each column as wide as its widest cell.
#[derive(Debug)]
pub struct Table {
    columns: Vec<(&'static str, Align)>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// With these headings.
    pub fn new(columns: &[(&'static str, Align)]) -> Table {
        Table {
            columns: columns.to_vec(),
            rows: Vec::new(),
        }
    }

    /// Appends a row of as many cells as there are columns.
    pub fn row(&mut self, cells: Vec<String>) {
        assert_eq!(cells.len(), self.columns.len(), "cells of a row");
        // Text from elsewhere must not move the terminal's cursor.
        let clean = |cell: String| cell.chars().filter(|c| !c.is_control()).collect();
        self.rows.push(cells.into_iter().map(clean).collect());
    }

    /// As text, each line indented by `indent` and without trailing spaces.
    pub fn render(&self, indent: usize) -> String {
        let heads: Vec<String> = self.columns.iter().map(|(head, _)| (*head).to_owned()).collect();
        let lines: Vec<&Vec<String>> = std::iter::once(&heads).chain(&self.rows).collect();
        let width = |column: usize| lines.iter().map(|l| l[column].chars().count()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..self.columns.len()).map(width).collect();
        let mut text = String::new();
        for line in lines {
            let mut shown = " ".repeat(indent);
            for ((cell, width), (_, align)) in line.iter().zip(&widths).zip(&self.columns) {
                match align {
                    Align::Left => shown.push_str(&format!("{cell:<width$}  ")),
                    Align::Right => shown.push_str(&format!("{cell:>width$}  ")),
                }
            }
            text.push_str(shown.trim_end());
            text.push('\n');
        }
        text
    }
}

/// `label  value` lines with the values under each other.
pub fn fields(rows: &[(&str, String)]) -> String {
    let width = rows
        .iter()
        .map(|(label, _)| label.chars().count())
        .max()
        .unwrap_or(0);
    rows.iter()
        .map(|(label, value)| format!("{label:<width$}  {value}\n"))
        .collect()
}

/// Bytes for people.
pub fn size(bytes: u64) -> String {
    ByteSize(bytes).to_string()
}

/// A share of a whole for people.
pub fn percent(part: u64, whole: u64) -> String {
    if whole == 0 {
        "-".to_owned()
    } else {
        format!("{:.0}%", part as f64 * 100.0 / whole as f64)
    }
}

/// Seconds for people.
pub fn duration(seconds: f64) -> String {
    match seconds {
        s if s < 60.0 => format!("{s:.0} s"),
        s if s < 3600.0 => format!("{:.0} min", s / 60.0),
        s => format!("{:.1} h", s / 3600.0),
    }
}

/// Asks before something is lost. `--yes` answers for scripts; without it, only a person at a terminal can.
pub fn confirm(question: &str, yes: bool) -> Outcome<()> {
    if yes {
        return Ok(());
    }
    if !io::stdin().is_terminal() {
        return Err(Failure::refused(
            format!("{question}: nobody is at the terminal to confirm"),
            "add --yes if you are sure",
        ));
    }
    eprint!("{question}. Type 'yes' to go on: ");
    let mut reply = String::new();
    io::stdin()
        .read_line(&mut reply)
        .map_err(|error| Failure::failed(format!("cannot read the reply: {error}"), ""))?;
    if reply.trim() == "yes" {
        return Ok(());
    }
    Err(Failure::refused("not confirmed, nothing was changed", ""))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let mut table = Table::new(&[("NAME", Align::Left), ("SIZE", Align::Right), ("X", Align::Left)]);
        table.row(vec!["a".into(), "1GiB".into(), String::new()]);
        table.row(vec!["longer".into(), "1023.5GiB".into(), "é\u{1b}[2Jx".into()]);
        let wanted = "NAME         SIZE  X\na            1GiB\nlonger  1023.5GiB  é[2Jx\n";
        assert_eq!(table.render(0), wanted);
        assert!(table.render(2).lines().all(|line| line.starts_with("  ")));
    }

    #[test]
    fn shares_are_whole_percents() {
        assert_eq!(percent(1, 3), "33%");
        assert_eq!(percent(0, 0), "-");
    }
}
