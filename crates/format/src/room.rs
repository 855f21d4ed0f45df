//! Growing tables within what the input can still fill (spec 10.1: a reader's memory is bounded by the
//! header's size).
//!
//! Doubling alone may hold three times a table's size while its rows move, two thirds of it for nothing.
//! Here a table that could be full before it has doubled twice takes all it can come to need at once.

use alloc::vec::Vec;

/// Makes room for one row at least, if there is none; `most` is how many rows the input can still fill.
#[inline]
pub(crate) fn grow<T>(table: &mut Vec<T>, most: usize) {
    if table.len() == table.capacity() {
        grow_full(table, most);
    }
}

#[cold]
fn grow_full<T>(table: &mut Vec<T>, most: usize) {
    let double = table.len().max(64);
    let more = if most / 3 <= table.len() {
        most
    } else {
        double
    };
    table.reserve_exact(more.max(1));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_never_outgrows_what_can_come() {
        for rows in [1, 63, 64, 65, 1000, 100_000] {
            let mut table = Vec::new();
            let mut moves = 0;
            for row in 0..rows {
                let before = table.capacity();
                grow(&mut table, rows - row);
                moves += usize::from(table.capacity() != before);
                table.push(row);
            }
            assert!(table.capacity() <= rows.max(64), "{rows}");
            assert!(moves <= 12, "{moves} moves for {rows}");
        }
        let mut table = alloc::vec![0];
        table.shrink_to_fit();
        grow(&mut table, 0);
        assert!(table.capacity() > 1);
    }
}
