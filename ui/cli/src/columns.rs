//! Tables as virsh prints them: columns as wide as their widest cell, a line of hyphens under the heading.

use unicode_width::UnicodeWidthStr;

/// Spaces around a cell besides its padding.
const GAP: usize = 3;

/// A table with its heading (left out where `quiet`).
pub fn table(heading: &[&str], rows: &[Vec<String>], quiet: bool) -> String {
    let mut widths: Vec<usize> =
        if quiet { vec![0; heading.len()] } else { heading.iter().map(|cell| cell.width()).collect() };
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.width());
        }
    }
    let mut out = String::new();
    if !quiet {
        line(&mut out, heading.iter().copied(), &widths);
        let total: usize = widths.iter().map(|width| width + GAP).sum();
        out.push_str(&"-".repeat(total));
        out.push('\n');
    }
    for row in rows {
        line(&mut out, row.iter().map(String::as_str), &widths);
    }
    out
}

fn line<'a>(out: &mut String, cells: impl Iterator<Item = &'a str>, widths: &[usize]) {
    let last = widths.len().saturating_sub(1);
    for (index, (cell, width)) in cells.zip(widths).enumerate() {
        out.push(' ');
        out.push_str(cell);
        if index != last {
            out.push_str(&" ".repeat(width.saturating_sub(cell.width()) + GAP - 1));
        }
    }
    out.push('\n');
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_by_width_not_by_bytes() {
        let rows = vec![vec!["-".to_owned(), "größe".to_owned(), "shut off".to_owned()]];
        let expected = " Id   Name    State\n------------------------\n -    größe   shut off\n";
        assert_eq!(table(&["Id", "Name", "State"], &rows, false), expected);
        assert_eq!(table(&["Id", "Name", "State"], &rows, true), " -   größe   shut off\n");
    }
}
