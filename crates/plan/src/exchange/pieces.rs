//! Files cut where the members change that want the bytes.

use std::collections::BTreeMap;

use smallvec::SmallVec;

use super::{Piece, Sets, Want};
use crate::error::{Error, Reason, Result};
use crate::io::strided::{Strided, Strides};

/// Runs from this size on are stretches of their own; shorter ones belong to whoever has the next ones too.
const LARGE: u64 = 256 << 10;
/// Stretches at most: each takes some memory, and a terabyte has as many of `LARGE`.
const MOST: usize = 1 << 22;

/// Bytes that somebody wants, all of them or short runs of them.
struct Stretch {
    begin: u64,
    end: u64,
    set: u32,
}

/// The pieces of all files, by file and offset, each with what is wanted of it. They are disjoint.
pub(super) fn of(wants: &[Want], sets: &mut Sets) -> Result<Vec<Piece>> {
    let mut pieces = Vec::new();
    for wants in wants.chunk_by(|a, b| a.file == b.file) {
        let Some(first) = wants.first() else { continue };
        let (mut solid, mut sparse) = (Vec::new(), Vec::new());
        for want in wants {
            stretches(&want.strided, want.set, &mut solid, &mut sparse);
            if solid.len() + sparse.len() > MOST {
                return Err(Error::new(Reason::Limit)
                    .found("a load of more pieces")
                    .needed(format_args!("at most {MOST}")));
            }
        }
        solid.extend(together(sparse, sets));
        sweep(first.file, &solid, sets, &mut pieces);
    }
    assign(wants, &mut pieces);
    pieces.retain(|piece| !piece.wants.is_empty());
    Ok(pieces)
}

fn stretches(copy: &Strided, set: u32, solid: &mut Vec<Stretch>, sparse: &mut Vec<Stretch>) {
    let stretch = |copy: &Strided| Stretch {
        begin: copy.src,
        end: copy.src_end(),
        set,
    };
    // Axes of step 0 come last, and bring no other bytes.
    let moving = copy.axes.iter().take_while(|axis| axis.src != 0).count();
    let axes = copy.axes.get(..moving).unwrap_or_default();
    let Some((axis, rest)) = axes.split_first() else {
        return solid.push(stretch(copy));
    };
    let inner = Strided {
        axes: Strides::from_slice(rest),
        ..*copy
    };
    if inner.src_span() < LARGE {
        return sparse.push(stretch(copy));
    }
    for at in 0..axis.extent {
        let part = Strided {
            src: copy.src + at * axis.src,
            ..inner.clone()
        };
        stretches(&part, set, solid, sparse);
    }
}

/// Stretches of short runs that overlap, as one: the runs of one member lie between those of another.
fn together(mut sparse: Vec<Stretch>, sets: &mut Sets) -> Vec<Stretch> {
    sparse.sort_by_key(|one| (one.begin, one.end));
    let mut made: Vec<Stretch> = Vec::new();
    let mut members: Vec<u32> = Vec::new();
    let mut close = |made: &mut Vec<Stretch>, members: &mut Vec<u32>| {
        members.sort_unstable();
        members.dedup();
        if let Some(last) = made.last_mut() {
            last.set = sets.union(members);
        }
        members.clear();
    };
    for one in sparse {
        match made.last_mut().filter(|last| one.begin < last.end) {
            Some(last) => last.end = last.end.max(one.end),
            None => {
                close(&mut made, &mut members);
                made.push(Stretch { ..one });
            }
        }
        members.push(one.set);
    }
    close(&mut made, &mut members);
    made
}

/// Cuts at each beginning and end; neighbours that the same members want are one piece.
fn sweep(file: usize, stretches: &[Stretch], sets: &mut Sets, pieces: &mut Vec<Piece>) {
    let mut events: Vec<(u64, bool, u32)> = Vec::with_capacity(2 * stretches.len());
    for one in stretches {
        events.push((one.begin, true, one.set));
        events.push((one.end, false, one.set));
    }
    events.sort_unstable();
    let mut open: BTreeMap<u32, usize> = BTreeMap::new();
    let mut at = 0;
    for (position, begins, set) in events {
        if position > at && !open.is_empty() {
            let wanting: SmallVec<[u32; 4]> = open.keys().copied().collect();
            let set = sets.union(&wanting);
            match pieces.last_mut() {
                Some(last) if last.file == file && last.end() == at && last.set == set => {
                    last.len = position - last.offset;
                }
                _ => pieces.push(Piece {
                    file,
                    offset: at,
                    len: position - at,
                    set,
                    wants: Vec::new(),
                }),
            }
        }
        at = position;
        let count = open.entry(set).or_insert(0);
        match begins {
            true => *count += 1,
            false => *count -= 1,
        }
        if *count == 0 {
            open.remove(&set);
        }
    }
}

/// Says of each piece what is wanted of it. Wants and pieces are sorted by file and offset.
pub(super) fn assign(wants: &[Want], pieces: &mut [Piece]) {
    let mut next = 0;
    let mut open: Vec<u32> = Vec::new();
    let mut file = usize::MAX;
    for piece in pieces {
        if piece.file != file {
            open.clear();
            file = piece.file;
        }
        while let Some(want) = wants.get(next) {
            if (want.file, want.strided.src) >= (file, piece.end()) {
                break;
            }
            if want.file == file {
                open.push(next as u32);
            }
            next += 1;
        }
        let reaches = |want: &Want| want.strided.src_end() > piece.offset;
        open.retain(|&at| wants.get(at as usize).is_some_and(reaches));
        let touches = |want: &Want| {
            let mut some = false;
            (want.strided).within_src(piece.offset, piece.end(), &mut |_| some = true);
            some
        };
        let touching = open.iter().copied();
        piece.wants = touching
            .filter(|&at| wants.get(at as usize).is_some_and(touches))
            .collect();
    }
}
