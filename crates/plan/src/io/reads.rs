//! From copies to reads: who is read together, and in which blocks.

use super::choose::{choose, stretches};
use super::profile::IoProfile;
use super::strided::{Strided, Strides};
use super::{Copy, IoPlan, Read, TensorIo, Way};

/// Runs from this size on are ranges of their own.
const LARGE: u64 = 1 << 20;
/// Ranges below this may be read together with their neighbours, and copied from there.
const SMALL: u64 = 256 << 10;
/// Bytes that one thread reads run by run.
const PORTION: u64 = 4 << 20;
/// Blocks end on multiples of this, so that direct reads overlap nowhere.
const PAGE: u64 = 4096;
/// What of a rank's ranges may be read in vain, so as to ask less often: one part in 32.
const SPARE: u64 = 32;

/// A stretch of a file that is read as one.
struct Stretch {
    begin: u64,
    end: u64,
    copies: Vec<usize>,
    /// Where it belongs, if it is a range that belongs in one place.
    range: Option<u64>,
}

pub(super) fn plan(mut copies: Vec<Copy>, locals: usize, profile: &IoProfile) -> IoPlan {
    copies.sort_by_key(|copy| (copy.file, copy.strided.src, copy.local, copy.strided.dst));
    let mut reads = Vec::new();
    let mut files: Vec<(usize, Vec<Stretch>)> = Vec::new();
    let mut at = 0;
    while let Some(first) = copies.get(at) {
        let file = first.file;
        let len = (copies.get(at..).unwrap_or_default())
            .iter()
            .take_while(|copy| copy.file == file)
            .count();
        files.push((
            file,
            stretches_of(&copies, at..at + len, profile, &mut reads),
        ));
        at += len;
    }
    join(&mut files, profile);
    for (file, stretches) in files {
        for stretch in stretches {
            cut(&copies, file, stretch, profile.block.max(PAGE), &mut reads);
        }
    }
    reads.sort_by_key(|read| (read.file(), read.offset()));
    let mut made = IoPlan {
        tensors: vec![TensorIo::default(); locals],
        needed: copies.iter().map(|copy| copy.strided.wanted()).sum(),
        read: reads.iter().map(Read::bytes).sum(),
        copies,
        reads,
    };
    count(&mut made);
    made
}

/// The stretches of one file, by offset; runs that are read for themselves go to `reads`.
fn stretches_of(
    copies: &[Copy],
    range: std::ops::Range<usize>,
    profile: &IoProfile,
    reads: &mut Vec<Read>,
) -> Vec<Stretch> {
    let mut found = Vec::new();
    let mut at = range.start;
    while at < range.end {
        let (group, end) = group_at(copies, at, range.end);
        let members = copies.get(group.clone()).unwrap_or_default();
        let choices = members.iter().map(|copy| choose(&copy.strided, profile));
        let choices: Vec<_> = choices.collect();
        let (begin, alone) = (
            members.first().map_or(0, |copy| copy.strided.src),
            members.len() == 1,
        );
        let apart: f64 = choices.iter().map(|choice| choice.cost).sum();
        let wanted = members.iter().map(|copy| copy.strided.wanted()).sum();
        let together = profile.reads(1, end - begin) + profile.scatters(wanted);
        if !alone && together < apart {
            found.push(Stretch {
                begin,
                end,
                copies: group.clone().collect(),
                range: None,
            });
        } else {
            for (position, choice) in group.clone().zip(choices) {
                let Some(copy) = copies.get(position) else {
                    continue;
                };
                apart_reads(copy, position, choice.level, &mut found, reads);
            }
        }
        at = group.end;
    }
    found.sort_by_key(|stretch| (stretch.begin, stretch.end));
    found
}

/// Copies from `at` on whose spans overlap, and where they end.
fn group_at(copies: &[Copy], at: usize, most: usize) -> (std::ops::Range<usize>, u64) {
    let (mut last, mut end) = (at, 0);
    for copy in copies.get(at..most).unwrap_or_default() {
        if last > at && copy.strided.src >= end {
            break;
        }
        end = end.max(copy.strided.src_end());
        last += 1;
    }
    (at..last, end)
}

/// One copy, read by itself.
fn apart_reads(
    copy: &Copy,
    position: usize,
    level: usize,
    found: &mut Vec<Stretch>,
    reads: &mut Vec<Read>,
) {
    let strided = &copy.strided;
    if level == 0 && strided.run < LARGE && !strided.axes.is_empty() {
        strided.portions(PORTION, &mut |strided| {
            reads.push(Read::Runs(Copy { strided, ..*copy }));
        });
        return;
    }
    let (_, span) = stretches(strided, level);
    let outer = Strided {
        run: span,
        axes: Strides::from_slice(
            strided
                .axes
                .get(..strided.axes.len() - level)
                .unwrap_or(&[]),
        ),
        ..*strided
    };
    let each = outer.for_each_run(&mut |src, dst| {
        found.push(Stretch {
            begin: src,
            end: src + span,
            copies: vec![position],
            range: (level == 0).then_some(dst),
        });
        Ok::<(), std::convert::Infallible>(())
    });
    match each {
        Ok(()) => {}
    }
}

/// Joins stretches that overlap, and near ones.
fn join(files: &mut [(usize, Vec<Stretch>)], profile: &IoProfile) {
    let ranges: u64 = (files.iter().flat_map(|(_, stretches)| stretches))
        .filter(|stretch| stretch.range.is_some())
        .map(|stretch| stretch.end - stretch.begin)
        .sum();
    // The smallest gaps first, until what may be read in vain is used up.
    let mut gaps = Vec::new();
    for (of, (_, stretches)) in files.iter().enumerate() {
        let mut reach = 0;
        for (at, pair) in stretches.windows(2).enumerate() {
            let [before, after] = pair else { continue };
            reach = reach.max(before.end);
            let Some(gap) = after
                .begin
                .checked_sub(reach)
                .filter(|&gap| gap <= profile.gap())
            else {
                continue;
            };
            let ranges = [before, after]
                .into_iter()
                .filter(|one| one.range.is_some());
            let (mut small, mut plain) = (true, 0);
            for range in ranges {
                small &= range.end - range.begin < SMALL;
                plain += 1;
            }
            // Two ranges without a gap need no block to be read at once.
            if small && (gap > 0 || plain < 2) {
                gaps.push((gap, plain > 0, of, at));
            }
        }
    }
    gaps.sort_unstable();
    let mut spare = ranges / SPARE;
    let mut joined: Vec<Vec<bool>> = (files.iter())
        .map(|(_, stretches)| vec![false; stretches.len()])
        .collect();
    for (gap, limited, of, at) in gaps {
        if limited {
            match spare.checked_sub(gap) {
                Some(rest) => spare = rest,
                None => continue,
            }
        }
        if let Some(flag) = joined.get_mut(of).and_then(|flags| flags.get_mut(at)) {
            *flag = true;
        }
    }
    for ((_, stretches), flags) in files.iter_mut().zip(joined) {
        let mut made: Vec<Stretch> = Vec::with_capacity(stretches.len());
        let mut with_last = false;
        for (stretch, with_next) in std::mem::take(stretches).into_iter().zip(flags) {
            match made.last_mut() {
                Some(last) if with_last || overlaps(last, &stretch) => {
                    last.end = last.end.max(stretch.end);
                    last.copies.extend(stretch.copies);
                    last.range = None;
                }
                _ => made.push(stretch),
            }
            with_last = with_next;
        }
        for stretch in &mut made {
            stretch.copies.sort_unstable();
            stretch.copies.dedup();
        }
        *stretches = made;
    }
}

/// Whether two stretches share bytes that need not be read twice: blocks of them do.
fn overlaps(last: &Stretch, next: &Stretch) -> bool {
    next.begin < last.end && last.range.is_none() && next.range.is_none()
}

/// The reads of a stretch: itself, if it is a range, else blocks.
fn cut(copies: &[Copy], file: usize, stretch: Stretch, block: u64, reads: &mut Vec<Read>) {
    if let (Some(dst), [only]) = (stretch.range, &stretch.copies[..])
        && let Some(copy) = copies.get(*only)
    {
        reads.push(Read::Range {
            local: copy.local,
            file,
            offset: stretch.begin,
            dst,
            len: stretch.end - stretch.begin,
        });
        return;
    }
    let mut begin = stretch.begin;
    while begin < stretch.end {
        let end = ((begin + block) / PAGE * PAGE)
            .max(begin + 1)
            .min(stretch.end);
        let mut block = Block {
            begin: end,
            end: begin,
            wanted: 0,
            copies: Vec::new(),
        };
        for &position in &stretch.copies {
            let Some(copy) = copies.get(position) else {
                continue;
            };
            block.take(position, &copy.strided, begin, end);
        }
        if block.wanted > 0 {
            reads.push(Read::Block {
                file,
                offset: block.begin,
                len: block.end - block.begin,
                wanted: block.wanted,
                copies: block.copies,
            });
        }
        begin = end;
    }
}

/// What of a block is wanted, and by whom.
struct Block {
    begin: u64,
    end: u64,
    wanted: u64,
    copies: Vec<usize>,
}

impl Block {
    fn take(&mut self, position: usize, copy: &Strided, begin: u64, end: u64) {
        let before = self.wanted;
        copy.within_src(begin, end, &mut |part| {
            self.begin = self.begin.min(part.src);
            self.end = self.end.max(part.src_end());
            self.wanted += part.wanted();
        });
        if self.wanted > before {
            self.copies.push(position);
        }
    }
}

/// What the reads come to, tensor by tensor.
fn count(plan: &mut IoPlan) {
    for copy in &plan.copies {
        if let Some(tensor) = plan.tensors.get_mut(copy.local) {
            tensor.needed += copy.strided.wanted();
            tensor.runs = tensor.runs.saturating_add(copy.strided.runs());
        }
    }
    let mut by_way = vec![[0_u64; 3]; plan.tensors.len()];
    let mut add = |tensors: &mut [TensorIo], local: usize, way: usize, read: u64, wanted: u64| {
        if let (Some(tensor), Some(ways)) = (tensors.get_mut(local), by_way.get_mut(local)) {
            tensor.read += read;
            ways[way] += wanted;
        }
    };
    for read in &plan.reads {
        match read {
            Read::Range { local, len, .. } => add(&mut plan.tensors, *local, 0, *len, *len),
            Read::Runs(copy) => {
                let bytes = copy.strided.bytes();
                add(&mut plan.tensors, copy.local, 1, bytes, bytes);
            }
            Read::Block {
                offset,
                len,
                wanted,
                copies,
                ..
            } => {
                let wants: Vec<(usize, u64, bool)> = (copies.iter())
                    .filter_map(|&at| plan.copies.get(at))
                    .map(|copy| wanted_of(copy, *offset, offset + len))
                    .collect();
                for (local, mine, share) in shares(&wants, *len, *wanted) {
                    add(&mut plan.tensors, local, 2, share, mine);
                }
            }
        }
    }
    for (tensor, [ranges, runs, blocks]) in plan.tensors.iter_mut().zip(by_way) {
        let all = [
            (ranges, Way::Ranges),
            (runs, Way::Runs),
            (blocks, Way::Blocks),
        ];
        let most = all
            .into_iter()
            .filter(|(bytes, _)| *bytes > 0)
            .max_by_key(|(bytes, _)| *bytes);
        tensor.way = most.map_or(Way::Nothing, |(_, way)| way);
    }
}

/// Whose copy it is, how much it wants of a block, and whether that has gaps.
fn wanted_of(copy: &Copy, begin: u64, end: u64) -> (usize, u64, bool) {
    let (mut mine, mut first, mut last) = (0, end, begin);
    copy.strided.within_src(begin, end, &mut |part| {
        mine += part.wanted();
        first = first.min(part.src);
        last = last.max(part.src_end());
    });
    (copy.local, mine, last.saturating_sub(first) > mine)
}

/// What of a block each copy answers for: what it wants, and of what nobody wants a part, if it has gaps. A norm
/// that is read together with the column shard beside it costs no more than it is long.
fn shares(
    wants: &[(usize, u64, bool)],
    len: u64,
    wanted: u64,
) -> impl Iterator<Item = (usize, u64, u64)> + '_ {
    let vain = len.saturating_sub(wanted);
    let with_gaps: u64 = wants.iter().filter(|want| want.2).map(|want| want.1).sum();
    let of = |part: u64, amount: u64, whole: u64| {
        let share = u128::from(amount) * u128::from(part) / u128::from(whole.max(1));
        u64::try_from(share).unwrap_or(amount)
    };
    wants.iter().map(move |&(local, mine, gaps)| {
        let share = match (wanted > len, with_gaps, gaps) {
            // Bytes that several want are shared by all of them.
            (true, ..) => of(mine, len, wanted),
            (false, 0, _) => mine + of(mine, vain, wanted),
            (false, _, true) => mine + of(mine, vain, with_gaps),
            (false, _, false) => mine,
        };
        (local, mine, share)
    })
}
