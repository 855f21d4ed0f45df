//! Strided copies in bytes: what a nest is once its elements are whole bytes.
//!
//! A [`Strided`] is a run of bytes repeated along a few axes, each with a step in the source and one in the
//! destination. A dimension-1 shard of a matrix is one of them, whatever its number of rows. It can be cut by a range of
//! the source (what one read brings), or of the destination (what one thread may write to), and the parts are
//! few: never one a run.

use std::fmt;

use smallvec::SmallVec;

/// One axis of a [`Strided`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stride {
    /// How many; at least 2.
    pub extent: u64,
    /// From one to the next in the source, in bytes; 0 where the same bytes are wanted several times.
    pub src: u64,
    /// From one to the next in the destination, in bytes.
    pub dst: u64,
}

/// The axes of a [`Strided`]: few have more than three.
pub type Strides = SmallVec<[Stride; 3]>;

/// Runs of bytes at regular distances, in a source and in a destination.
///
/// ```text
///  source       src ├ run ┤        ├ run ┤        ├ run ┤        extent = 3
///                   ├── axis.src ──┤
///  destination  dst ├ run ├ run ├ run ┤                          axis.dst = run
/// ```
///
/// Axes come in the order of falling steps in the source, and the parts along one do not overlap there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Strided {
    /// First byte in the source.
    pub src: u64,
    /// First byte in the destination.
    pub dst: u64,
    /// Bytes that are consecutive in both.
    pub run: u64,
    /// How it is repeated.
    pub axes: Strides,
}

/// An axis before it was looked at: extent, and steps in bits in the source and in the destination.
pub type BitAxis = (u64, u64, u64);

/// Why a nest is no strided copy of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// It begins, ends or steps inside a byte.
    PartialByte,
    /// Numbers leave what a file or memory can have.
    Overflow,
    /// Parts along an axis overlap in the source, or have one place in the destination.
    Irregular,
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Refused::PartialByte => "a part begins or ends inside a byte",
            Refused::Overflow => "a part lies beyond what a file or memory can have",
            Refused::Irregular => "a part overlaps itself",
        })
    }
}

impl std::error::Error for Refused {}

/// No file and no memory has more bytes.
const MOST: u64 = i64::MAX as u64;

impl Strided {
    /// The copy of `unit` bits from `src` to `dst`, repeated along `axes`, in whole bytes and as few axes as
    /// possible. `None` where it copies nothing.
    ///
    /// # Errors
    /// [`Refused`].
    pub fn new(
        src: u64,
        dst: u64,
        unit: u64,
        axes: impl IntoIterator<Item = BitAxis>,
    ) -> Result<Option<Strided>, Refused> {
        let mut made: SmallVec<[BitAxis; 4]> = SmallVec::new();
        let mut run = unit;
        for (extent, from, to) in axes {
            match extent {
                0 => return Ok(None),
                1 => continue,
                _ if to == 0 => return Err(Refused::Irregular),
                _ => made.push((extent, from, to)),
            }
        }
        if unit == 0 {
            return Ok(None);
        }
        // What is consecutive in both is one run.
        while let Some(at) = made
            .iter()
            .position(|&(_, from, to)| from == run && to == run)
        {
            let (extent, ..) = made.remove(at);
            run = run.checked_mul(extent).ok_or(Refused::Overflow)?;
        }
        if [src, dst, run].iter().any(|bits| bits % 8 != 0)
            || made
                .iter()
                .any(|&(_, from, to)| from % 8 != 0 || to % 8 != 0)
        {
            return Err(Refused::PartialByte);
        }
        let mut axes: Strides = (made.iter())
            .map(|&(extent, from, to)| Stride {
                extent,
                src: from / 8,
                dst: to / 8,
            })
            .collect();
        join(&mut axes);
        axes.sort_by_key(|axis| (std::cmp::Reverse(axis.src), std::cmp::Reverse(axis.dst)));
        let made = Strided {
            src: src / 8,
            dst: dst / 8,
            run: run / 8,
            axes,
        };
        made.check()?;
        Ok(Some(made))
    }

    /// Numbers stay below what files have, and parts along an axis do not overlap in the source.
    fn check(&self) -> Result<(), Refused> {
        let (mut from, mut to, mut count) = (self.run, self.run, self.run);
        for axis in self.axes.iter().rev() {
            if axis.src != 0 && axis.src < from {
                return Err(Refused::Irregular);
            }
            let more = |step: u64| (axis.extent - 1).checked_mul(step);
            from = add(more(axis.src), from)?;
            to = add(more(axis.dst), to)?;
            count = count
                .checked_mul(axis.extent)
                .filter(|&count| count <= MOST)
                .ok_or(Refused::Overflow)?;
        }
        add(Some(from), self.src)?;
        add(Some(to), self.dst)?;
        Ok(())
    }

    /// How many runs.
    pub fn runs(&self) -> u64 {
        self.axes.iter().map(|axis| axis.extent).product()
    }

    /// Bytes that it copies.
    pub fn bytes(&self) -> u64 {
        self.run * self.runs()
    }

    /// Different bytes of the source that it wants.
    pub fn wanted(&self) -> u64 {
        let moving = self.axes.iter().filter(|axis| axis.src != 0);
        self.run * moving.map(|axis| axis.extent).product::<u64>()
    }

    /// Bytes from its first to its last in the source.
    pub fn src_span(&self) -> u64 {
        self.run
            + (self.axes.iter())
                .map(|axis| (axis.extent - 1) * axis.src)
                .sum::<u64>()
    }

    /// One past its last byte in the source.
    pub fn src_end(&self) -> u64 {
        self.src + self.src_span()
    }

    /// Bytes from its first to its last in the destination.
    pub fn dst_span(&self) -> u64 {
        self.run
            + (self.axes.iter())
                .map(|axis| (axis.extent - 1) * axis.dst)
                .sum::<u64>()
    }

    /// One past its last byte in the destination.
    pub fn dst_end(&self) -> u64 {
        self.dst + self.dst_span()
    }

    /// The parts whose bytes in the source lie in `begin..end`.
    pub fn within_src(&self, begin: u64, end: u64, part: &mut dyn FnMut(Strided)) {
        let (first, last) = (self.src, self.src_end());
        if last <= begin || first >= end {
            return;
        }
        if begin <= first && last <= end {
            return part(self.clone());
        }
        let Some((axis, rest)) = self.axes.split_first() else {
            let (from, to) = (begin.max(first), end.min(last));
            return part(Strided {
                src: from,
                dst: self.dst + (from - first),
                run: to - from,
                axes: Strides::new(),
            });
        };
        let inner = Strided {
            axes: Strides::from_slice(rest),
            ..*self
        };
        if axis.src == 0 {
            // Axes of step 0 come last: the run is cut, and each part repeated.
            return inner.within_src(begin, end, &mut |mut cut| {
                cut.axes.push(*axis);
                part(cut);
            });
        }
        let span = inner.src_span();
        // Parts touched, and those wholly inside.
        let touched = begin.saturating_sub(first + span - 1).div_ceil(axis.src)
            ..(end - first).div_ceil(axis.src).min(axis.extent);
        let whole = begin
            .saturating_sub(first)
            .div_ceil(axis.src)
            .max(touched.start)..match (end - first).checked_sub(span) {
            Some(room) => (room / axis.src + 1).min(touched.end),
            None => 0,
        };
        let one = |at: u64| Strided {
            src: first + at * axis.src,
            dst: self.dst + at * axis.dst,
            ..inner.clone()
        };
        if whole.is_empty() {
            return touched.for_each(|at| one(at).within_src(begin, end, part));
        }
        (touched.start..whole.start).for_each(|at| one(at).within_src(begin, end, part));
        let mut middle = one(whole.start);
        if whole.end - whole.start > 1 {
            let extent = whole.end - whole.start;
            middle.axes.insert(0, Stride { extent, ..*axis });
        }
        part(middle);
        (whole.end..touched.end).for_each(|at| one(at).within_src(begin, end, part));
    }

    /// The parts whose bytes in the destination lie in `begin..end`. Parts along an axis must not overlap there,
    /// as the proof of a plan says.
    pub fn within_dst(&self, begin: u64, end: u64, part: &mut dyn FnMut(Strided)) {
        let inside = begin <= self.dst && self.dst_end() <= end;
        if inside {
            return part(self.clone());
        }
        (self.clone().turned()).within_src(begin, end, &mut |cut| part(cut.turned()));
    }

    /// Source and destination exchanged.
    fn turned(mut self) -> Strided {
        std::mem::swap(&mut self.src, &mut self.dst);
        for axis in &mut self.axes {
            std::mem::swap(&mut axis.src, &mut axis.dst);
        }
        self.axes
            .sort_by_key(|axis| (std::cmp::Reverse(axis.src), std::cmp::Reverse(axis.dst)));
        self
    }

    /// Cuts it along its outer axes, in portions of at most `most` bytes or of one run.
    pub fn portions(&self, most: u64, portion: &mut dyn FnMut(Strided)) {
        let Some((axis, rest)) = self.axes.split_first().filter(|_| self.bytes() > most) else {
            return portion(self.clone());
        };
        let inner = Strided {
            axes: Strides::from_slice(rest),
            ..*self
        };
        let many = (most / inner.bytes()).max(1);
        let mut at = 0;
        while at < axis.extent {
            let extent = many.min(axis.extent - at);
            let mut part = inner.clone();
            (part.src, part.dst) = (part.src + at * axis.src, part.dst + at * axis.dst);
            if extent > 1 {
                part.axes.insert(0, Stride { extent, ..*axis });
            }
            match extent {
                1 => part.portions(most, portion),
                _ => portion(part),
            }
            at += extent;
        }
    }

    /// Calls `run` with the first byte of each run in the source and in the destination, in the order of the
    /// source, until it fails.
    ///
    /// # Errors
    /// What `run` says.
    pub fn for_each_run<E>(
        &self,
        run: &mut impl FnMut(u64, u64) -> Result<(), E>,
    ) -> Result<(), E> {
        fn along<E>(
            axes: &[Stride],
            src: u64,
            dst: u64,
            run: &mut impl FnMut(u64, u64) -> Result<(), E>,
        ) -> Result<(), E> {
            let Some((axis, rest)) = axes.split_first() else {
                return run(src, dst);
            };
            (0..axis.extent)
                .try_for_each(|at| along(rest, src + at * axis.src, dst + at * axis.dst, run))
        }
        along(&self.axes, self.src, self.dst, run)
    }

    /// Copies. `from` begins at byte `from_base` of the source, `to` at byte `to_base` of the destination. Says
    /// whether all of it lay within both; nothing is copied if not.
    pub fn copy(&self, from: &[u8], from_base: u64, to: &mut [u8], to_base: u64) -> bool {
        let place = |at: u64, base: u64, span: u64, len: usize| {
            let begin = usize::try_from(at.checked_sub(base)?).ok()?;
            let end = begin.checked_add(usize::try_from(span).ok()?)?;
            (end <= len).then_some(begin)
        };
        let src = place(self.src, from_base, self.src_span(), from.len());
        let dst = place(self.dst, to_base, self.dst_span(), to.len());
        let (Some(src), Some(dst)) = (src, dst) else {
            return false;
        };
        // Everything below fits: it lies within spans that do.
        copy_along(&self.axes, self.run as usize, (from, src), (to, dst));
        true
    }
}

fn copy_along(axes: &[Stride], run: usize, from: (&[u8], usize), to: (&mut [u8], usize)) {
    let ((from, src), (to, dst)) = (from, to);
    match axes {
        [] => copy_run(run, from, src, to, dst),
        [axis] => match run {
            1 => copy_elements::<1>(axis, from, src, to, dst),
            2 => copy_elements::<2>(axis, from, src, to, dst),
            4 => copy_elements::<4>(axis, from, src, to, dst),
            8 => copy_elements::<8>(axis, from, src, to, dst),
            _ => {
                for at in 0..axis.extent as usize {
                    let (more, further) = (at * axis.src as usize, at * axis.dst as usize);
                    copy_run(run, from, src + more, to, dst + further);
                }
            }
        },
        [axis, rest @ ..] => {
            for at in 0..axis.extent as usize {
                let (more, further) = (at * axis.src as usize, at * axis.dst as usize);
                copy_along(rest, run, (from, src + more), (to, dst + further));
            }
        }
    }
}

fn copy_run(run: usize, from: &[u8], src: usize, to: &mut [u8], dst: usize) {
    if let (Some(from), Some(to)) = (from.get(src..src + run), to.get_mut(dst..dst + run)) {
        to.copy_from_slice(from);
    }
}

/// Single elements, as of a transposed tensor.
fn copy_elements<const N: usize>(
    axis: &Stride,
    from: &[u8],
    src: usize,
    to: &mut [u8],
    dst: usize,
) {
    let (step, out) = (axis.src as usize, axis.dst as usize);
    let (Some(from), Some(to)) = (from.get(src..), to.get_mut(dst..)) else {
        return;
    };
    for at in 0..axis.extent as usize {
        let element: Option<&[u8; N]> = from.get(at * step..).and_then(<[u8]>::first_chunk);
        let place: Option<&mut [u8; N]> = to.get_mut(at * out..).and_then(<[u8]>::first_chunk_mut);
        if let (Some(element), Some(place)) = (element, place) {
            *place = *element;
        }
    }
}

/// Joins axes that are one: the outer one's steps are the inner one's, times its extent.
fn join(axes: &mut Strides) {
    let mut at = 0;
    while at < axes.len() {
        let outer = axes[at];
        let inner = (0..axes.len()).find(|&other| {
            let inner = axes[other];
            let is =
                |outer: u64, inner_step: u64| inner_step.checked_mul(inner.extent) == Some(outer);
            other != at && is(outer.src, inner.src) && is(outer.dst, inner.dst)
        });
        match inner.and_then(|other| Some((other, axes[other].extent.checked_mul(outer.extent)?))) {
            Some((other, extent)) => {
                axes[other].extent = extent;
                axes.remove(at);
                at = 0;
            }
            None => at += 1,
        }
    }
}

fn add(a: Option<u64>, b: u64) -> Result<u64, Refused> {
    a.and_then(|a| a.checked_add(b))
        .filter(|&sum| sum <= MOST)
        .ok_or(Refused::Overflow)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Every byte that is copied: where from, where to.
    fn bytes(copy: &Strided) -> Vec<(u64, u64)> {
        let mut all = Vec::new();
        let run = copy.run;
        copy.for_each_run(&mut |src, dst| {
            all.extend((0..run).map(|at| (src + at, dst + at)));
            Ok::<(), ()>(())
        })
        .unwrap();
        all.sort_unstable();
        all
    }

    /// A row-major tensor of one byte an element, permuted, of which a part of each dimension is taken.
    fn nest() -> impl Strategy<Value = Strided> {
        let dims = prop::collection::vec((1_u64..6, 0_u64..4, 0_u64..4), 1..5);
        (dims, any::<u64>(), 1_u64..4, 0_u64..50, 0_u64..50, 1_u64..3).prop_map(
            |(dims, shuffle, unit, src, dst, repeat)| {
                let mut axes = Vec::new();
                let (mut step, mut begin) = (unit, src);
                for &(taken, before, after) in dims.iter().rev() {
                    axes.push((taken, step));
                    begin += before * step;
                    step *= taken + before + after;
                }
                let mut state = shuffle;
                for at in (1..axes.len()).rev() {
                    axes.swap(at, (state % (at as u64 + 1)) as usize);
                    state /= at as u64 + 1;
                }
                let mut out = unit;
                let mut bits: Vec<BitAxis> = Vec::new();
                for (extent, step) in axes {
                    bits.push((extent, step * 8, out * 8));
                    out *= extent;
                }
                bits.push((repeat, 0, out * 8));
                Strided::new(begin * 8, dst * 8, unit * 8, bits)
                    .unwrap()
                    .unwrap()
            },
        )
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn cuts_lose_and_repeat_nothing(
            copy in nest(), begin in 0_u64..300, len in 0_u64..300, dst in any::<bool>(),
        ) {
            let end = begin + len;
            let mut found = Vec::new();
            let mut parts = 0;
            let mut take = |part: Strided| {
                prop_assert!(part.check().is_ok());
                parts += 1;
                found.extend(bytes(&part));
                Ok(())
            };
            let mut failed = Ok(());
            let mut each = |part| if let Err(error) = take(part) { failed = Err(error) };
            match dst {
                true => copy.within_dst(begin, end, &mut each),
                false => copy.within_src(begin, end, &mut each),
            }
            failed?;
            found.sort_unstable();
            let mut wanted = bytes(&copy);
            wanted.retain(|&(src, to)| (begin..end).contains(if dst { &to } else { &src }));
            prop_assert_eq!(found, wanted);
            // Two cuts, each with a part a level at most, and what lies between them.
            prop_assert!(parts <= 2 * copy.axes.len() + 3, "{parts} parts of {copy:?}");
        }

        #[test]
        fn a_copy_is_its_bytes(copy in nest(), lead in 0_u64..5) {
            let from: Vec<u8> = (0..copy.src_span() + lead).map(|at| (at * 7 + at / 251) as u8).collect();
            let base = copy.src.saturating_sub(lead);
            let from = &from[..(copy.src_end() - base) as usize];
            let mut to = vec![0xee; copy.dst_end() as usize];
            prop_assert!(copy.copy(from, base, &mut to, 0));
            let mut slow = vec![0xee; to.len()];
            for (src, dst) in bytes(&copy) {
                slow[dst as usize] = from[(src - base) as usize];
            }
            prop_assert_eq!(&to, &slow);
            prop_assert_eq!(copy.bytes(), bytes(&copy).len() as u64);
            prop_assert!(!copy.copy(&from[..from.len() - 1], base, &mut to, 0));
            prop_assert!(!copy.copy(from, base, &mut slow, 1 + copy.dst));
        }
    }

    #[test]
    fn axes_are_as_few_as_possible() {
        // All of a tensor of 3 × 4 × 5 elements of 2 bytes.
        let whole = [(3, 320, 320), (4, 80, 80), (5, 16, 16)];
        let whole = Strided::new(64, 0, 16, whole).unwrap().unwrap();
        assert_eq!((whole.run, whole.axes.len()), (120, 0));
        // Columns 1 and 2 of each row: one axis of 12 rows.
        let part = [(3, 320, 128), (4, 80, 32), (2, 16, 16)];
        let part = Strided::new(64 + 16, 0, 16, part).unwrap().unwrap();
        let axis = Stride {
            extent: 12,
            src: 10,
            dst: 4,
        };
        assert_eq!((part.src, part.run, &part.axes[..]), (10, 4, &[axis][..]));
        assert_eq!(
            (part.bytes(), part.src_span(), part.dst_span()),
            (48, 114, 48)
        );
    }

    #[test]
    fn what_is_no_copy_of_bytes_is_refused() {
        let new = |src, dst, unit, axes: &[BitAxis]| Strided::new(src, dst, unit, axes.to_vec());
        assert_eq!(new(4, 0, 8, &[]), Err(Refused::PartialByte));
        assert_eq!(new(0, 0, 4, &[(3, 4, 4)]), Err(Refused::PartialByte));
        assert_eq!(new(0, 0, 4, &[(4, 4, 4)]).unwrap().unwrap().run, 2);
        assert_eq!(new(0, 0, 8, &[(3, 8, 0)]), Err(Refused::Irregular));
        assert_eq!(new(0, 0, 16, &[(3, 8, 16)]), Err(Refused::Irregular));
        assert_eq!(new(0, 0, 8, &[(u64::MAX, 16, 16)]), Err(Refused::Overflow));
        assert_eq!(
            new(0, 0, 8, &[(1 << 40, 8 << 40, 8), (1 << 40, 8, 8 << 40)]),
            Err(Refused::Overflow)
        );
        assert_eq!(new(0, 0, 8, &[(0, 8, 8)]), Ok(None));
        assert_eq!(
            new(0, 0, 8, &[(i64::MAX as u64, u64::MAX / 8 * 8, 8)]),
            Err(Refused::Overflow)
        );
    }
}
