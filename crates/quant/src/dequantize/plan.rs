//! A descriptor made ready to run in tiles: a few hundred columns of a row at a time, in the first cache, each step of
//! the rule over all of them.
//!
//! Every number goes through the interpreter's own operations in its order, on `f32`s one by one; what is saved is the
//! address arithmetic, and scales that are read once a block.

use std::collections::BTreeMap;
use std::ops::Range;

use half::f16;

use super::codes::{Codes, Window};
use super::field::{FieldPlan, lookup, missing, size};
use super::rule::join;
use crate::descriptor::{Descriptor, Element, Field, Float, Number, Op, Role, Scale, Zero};
use crate::error::Error;
use crate::interpret::{group_index, number_of, split, table};

/// Columns at a time.
pub(super) const TILE: usize = 512;
/// Rows whose tiles are read one after the other: columns whose codes share words in another row find them in the cache.
const ROWS: u64 = 16;

/// The bytes of parts, or of what is needed of them.
pub type Windows<'a> = BTreeMap<Role, Window<'a>>;

/// A descriptor and how its parts are read.
#[derive(Debug)]
pub(super) struct Plan {
    descriptor: Descriptor,
    rows: u64,
    columns: u64,
    codes: Codes,
    lookup: Option<Vec<f32>>,
    scales: Vec<ScalePlan>,
    zero: Option<FieldPlan>,
}

#[derive(Debug)]
struct ScalePlan {
    scale: Scale,
    field: FieldPlan,
    times: Option<FieldPlan>,
}

/// What a run needs besides the windows: made once a call.
struct Run<'a> {
    plan: &'a Plan,
    windows: &'a Windows<'a>,
    groups: Option<Vec<u64>>,
    most_groups: u64,
    elements: Option<Vec<f32>>,
    tables: Vec<Option<Vec<f32>>>,
}

/// Room for a tile.
pub(super) struct Work {
    pub codes: Vec<u32>,
    pub numbers: Vec<f32>,
    pub scale: Vec<f32>,
    pub zero: Vec<f32>,
    extra: Vec<f32>,
    pub halves: Vec<f16>,
    pub values: Vec<f32>,
}

impl Plan {
    /// A descriptor over parts of so many bytes.
    pub fn new(descriptor: Descriptor, bytes: &BTreeMap<Role, u64>) -> Result<Self, Error> {
        let count = |shape: &[u64]| shape.iter().try_fold(1_u64, |n, &len| n.checked_mul(len));
        let Some((&columns, lead)) = descriptor.shape.split_last() else {
            return Err(Error::layout("a tensor without axes".to_owned()));
        };
        let (Some(rows), Some(all)) = (count(lead), count(&descriptor.shape)) else {
            return Err(Error::layout(
                "a shape whose product does not fit".to_owned(),
            ));
        };
        let (role, layout) = &descriptor.codes;
        if count(&descriptor.view) != Some(all) || layout.shape != descriptor.shape {
            return Err(Error::layout("shapes of different sizes".to_owned()));
        }
        let codes = Codes::new(layout, size(bytes, *role)?)?;
        let field = |field: &Field| FieldPlan::new(field, &descriptor, bytes);
        let scales = descriptor.scales.iter().map(|scale| {
            Ok(ScalePlan {
                field: field(&scale.field)?,
                times: scale.times.as_ref().map(field).transpose()?,
                scale: scale.clone(),
            })
        });
        let scales = scales.collect::<Result<_, Error>>()?;
        let zero = match &descriptor.zero {
            Some(Zero::Field(zero)) => Some(field(zero)?),
            _ => None,
        };
        let lookup = match descriptor.element {
            Element::Number(number) => lookup(number, layout.bits()),
            _ => None,
        };
        Ok(Plan {
            rows,
            columns,
            codes,
            lookup,
            scales,
            zero,
            descriptor,
        })
    }

    pub fn elements(&self) -> u64 {
        self.rows.saturating_mul(self.columns)
    }

    /// For each part, the bytes that hold what these elements are made of.
    pub fn needs(&self, elements: Range<u64>) -> BTreeMap<Role, Range<u64>> {
        let mut needs = BTreeMap::new();
        if elements.is_empty() || self.columns == 0 {
            return needs;
        }
        let rows = elements.start / self.columns..elements.end.div_ceil(self.columns);
        let columns = match rows.end - rows.start {
            1 => {
                let row = rows.start * self.columns;
                elements.start - row..elements.end - row
            }
            _ => 0..self.columns,
        };
        let leads: Vec<_> = rows.map(|row| split(row, &self.descriptor.shape)).collect();
        let mut need = |role: Role, span: Range<u64>| {
            let all = needs.entry(role).or_insert(span.clone());
            *all = all.start.min(span.start)..all.end.max(span.end);
        };
        let leading = leads.iter().map(|lead| &lead[..]);
        need(
            self.descriptor.codes.0,
            self.codes.span(leading, columns.clone()),
        );
        let scales = self.scales.iter();
        let fields = scales.flat_map(|s| std::iter::once(&s.field).chain(&s.times));
        for field in fields.chain(&self.zero) {
            let mut blocks: Vec<Vec<u64>> = leads.iter().map(|lead| field.lead(lead)).collect();
            blocks.dedup();
            let last = field.layout_columns();
            let along = match self.descriptor.group_index {
                // Any group may be that of any column.
                Some(_) => 0..last,
                None => field.last(columns.start)..(field.last(columns.end - 1) + 1).min(last),
            };
            let span = field.codes.span(blocks.iter().map(|b| &b[..]), along);
            need(field.field.role, span);
        }
        needs
    }

    /// The parts that are always needed whole: tables, and groups of columns.
    pub fn whole(&self) -> impl Iterator<Item = Role> + '_ {
        let element = match self.descriptor.element {
            Element::Table(role) => Some(role),
            _ => None,
        };
        let tables = self.scales.iter().filter_map(|s| s.scale.table);
        tables.chain(element).chain(self.descriptor.group_index)
    }

    /// Values of elements in their order, tile by tile: `each` is given the position of a tile's first among the elements
    /// asked for, and its values.
    pub fn run(
        &self,
        elements: Range<u64>,
        windows: &Windows<'_>,
        mut each: impl FnMut(u64, &[f32]),
    ) -> Result<(), Error> {
        if elements.is_empty() {
            return Ok(());
        }
        let run = Run::new(self, windows)?;
        let mut work = Work::new();
        let (first, end) = (
            elements.start / self.columns,
            elements.end.div_ceil(self.columns),
        );
        for from in (first..end).step_by(ROWS as usize) {
            let rows = from..from.saturating_add(ROWS).min(end);
            for tile in (0..self.columns).step_by(TILE) {
                for row in rows.clone() {
                    let begin = row * self.columns;
                    let start = (begin + tile).max(elements.start);
                    let stop = (begin + self.columns.min(tile + TILE as u64)).min(elements.end);
                    if start < stop {
                        let len = (stop - start) as usize;
                        let lead = split(row, &self.descriptor.shape);
                        run.tile(&lead, start - begin, len, &mut work);
                        each(start - elements.start, &work.values[..len]);
                    }
                }
            }
        }
        Ok(())
    }

    pub fn dtype(&self) -> Float {
        self.descriptor.dtype
    }
}

impl<'a> Run<'a> {
    fn new(plan: &'a Plan, windows: &'a Windows<'a>) -> Result<Self, Error> {
        let whole = |role: Role| match windows.get(&role) {
            Some(window) if window.start == 0 => Ok(window.bytes),
            _ => Err(missing(role)),
        };
        let groups = match plan.descriptor.group_index {
            Some(role) => Some(group_index(whole(role)?, plan.columns)?),
            None => None,
        };
        let most = groups
            .as_ref()
            .and_then(|groups| groups.iter().max())
            .map_or(0, |most| most.saturating_add(1));
        if groups.is_some() {
            let scales = plan.scales.iter();
            let fields = scales.flat_map(|s| std::iter::once(&s.field).chain(&s.times));
            for field in fields.chain(&plan.zero) {
                field.reaches(plan.descriptor.shape.len().saturating_sub(1), most)?;
            }
        }
        for (role, need) in plan.needs(0..1) {
            // What is not in a window reads as zero; a part that nobody gave is an error.
            if !need.is_empty() && !windows.contains_key(&role) {
                return Err(missing(role));
            }
        }
        Ok(Run {
            elements: match &plan.descriptor.element {
                Element::Known(values) => Some(values.to_vec()),
                Element::Table(role) => Some(table(whole(*role)?)),
                Element::Number(_) => plan.lookup.clone(),
            },
            tables: (plan.scales.iter())
                .map(|s| {
                    s.scale
                        .table
                        .map(|role| Ok(table(whole(role)?)))
                        .transpose()
                })
                .collect::<Result<_, Error>>()?,
            plan,
            windows,
            groups,
            most_groups: most,
        })
    }

    fn window(&self, role: Role) -> Window<'a> {
        self.windows.get(&role).copied().unwrap_or_default()
    }

    fn tile(&self, lead: &[u64], first: u64, len: usize, work: &mut Work) {
        let plan = self.plan;
        let descriptor = &plan.descriptor;
        let codes = &mut work.codes[..len];
        plan.codes
            .row(self.window(descriptor.codes.0), lead, first, codes);
        self.elements(codes, &mut work.values[..len]);
        self.scales(lead, first, len, work);
        match (&descriptor.zero, &plan.zero) {
            (Some(Zero::Constant(zero)), _) => work.zero[..len].fill(*zero),
            (_, Some(zero)) => {
                let mut out = std::mem::take(&mut work.zero);
                self.spread(zero, None, lead, first, &mut out[..len], work);
                work.zero = out;
            }
            _ => work.zero[..len].fill(0.0),
        }
        join(descriptor, len, work);
    }

    /// What codes stand for.
    fn elements(&self, codes: &[u32], values: &mut [f32]) {
        let pairs = values.iter_mut().zip(codes);
        match (&self.plan.descriptor.element, &self.elements) {
            (Element::Number(Number::Unsigned { offset }), _)
                if offset.unsigned_abs() < 1 << 20 && self.plan.codes.layout.bits() <= 16 =>
            {
                let offset = *offset as i32;
                pairs.for_each(|(value, code)| *value = (*code as i32 - offset) as f32);
            }
            (Element::Number(Number::Signed), _) => {
                let spare = 32_u32.saturating_sub(self.plan.codes.layout.bits()).min(31);
                pairs.for_each(|(value, code)| *value = (((code << spare) as i32) >> spare) as f32);
            }
            (_, Some(table)) => {
                pairs.for_each(|(value, code)| {
                    *value = table.get(*code as usize).copied().unwrap_or(f32::NAN);
                });
            }
            (Element::Number(number), None) => {
                let bits = self.plan.codes.layout.bits();
                pairs.for_each(|(value, code)| *value = number_of(*number, *code, bits));
            }
            (_, None) => values.fill(f32::NAN),
        }
    }

    /// All scales of a tile, joined in their order.
    fn scales(&self, lead: &[u64], first: u64, len: usize, work: &mut Work) {
        if self.plan.scales.is_empty() {
            work.scale[..len].fill(1.0);
        }
        for (at, (scale, table)) in self.plan.scales.iter().zip(&self.tables).enumerate() {
            let mut out = std::mem::take(if at == 0 {
                &mut work.scale
            } else {
                &mut work.extra
            });
            let one = &mut out[..len];
            self.spread(&scale.field, table.as_deref(), lead, first, one, work);
            if let Some(times) = &scale.times {
                let mut more = vec![0.0; len];
                self.spread(times, None, lead, first, &mut more, work);
                one.iter_mut().zip(&more).for_each(|(a, b)| *a *= b);
            }
            if scale.scale.plus != 0.0 {
                one.iter_mut().for_each(|a| *a += scale.scale.plus);
            }
            if at == 0 {
                work.scale = out;
                continue;
            }
            let pairs = work.scale.iter_mut().zip(&*one);
            match scale.scale.op {
                Op::Multiply => pairs.for_each(|(whole, one)| *whole *= one),
                Op::Divide => pairs.for_each(|(whole, one)| *whole /= one),
            }
            work.extra = out;
        }
    }

    /// A field's number for each column.
    fn spread(
        &self,
        plan: &FieldPlan,
        table: Option<&[f32]>,
        lead: &[u64],
        first: u64,
        out: &mut [f32],
        work: &mut Work,
    ) {
        let window = self.window(plan.field.role);
        let lead = plan.lead(lead);
        let len = out.len() as u64;
        if let Some(groups) = &self.groups {
            let first = usize::try_from(first).unwrap_or(usize::MAX);
            let groups = groups.get(first..).unwrap_or_default();
            if self.most_groups <= 2 * len {
                let blocks = plan.last(self.most_groups.saturating_sub(1)) + 1;
                let numbers = plan.numbers(window, table, &lead, 0..blocks, work);
                for (out, group) in out.iter_mut().zip(groups) {
                    let at = plan.last(*group) as usize;
                    *out = numbers.get(at).copied().unwrap_or(f32::NAN);
                }
                return;
            }
            for (out, group) in out.iter_mut().zip(groups) {
                let at = plan.last(*group);
                let numbers = plan.numbers(window, table, &lead, at..at + 1, work);
                *out = numbers.first().copied().unwrap_or(f32::NAN);
            }
            return;
        }
        let blocks = plan.last(first)..plan.last(first + len - 1) + 1;
        let numbers = plan.numbers(window, table, &lead, blocks, work);
        let block = plan.field.block.last().copied().unwrap_or(0);
        if let ([one], _) | ([one, ..], 0) = (numbers, block) {
            out.fill(*one);
            return;
        }
        // Columns of the first block that are left of it.
        let phase = plan.field.phase.last().copied().unwrap_or(0);
        let mut left = block - (first + phase) % block;
        let mut rest = out;
        for number in numbers {
            let take = usize::try_from(left).unwrap_or(usize::MAX).min(rest.len());
            let (run, after) = std::mem::take(&mut rest).split_at_mut(take);
            run.fill(*number);
            (rest, left) = (after, block);
        }
    }
}

impl Work {
    fn new() -> Self {
        let room = || vec![0.0; TILE];
        Work {
            codes: vec![0; TILE],
            numbers: room(),
            scale: room(),
            zero: room(),
            extra: room(),
            halves: vec![f16::ZERO; TILE],
            values: room(),
        }
    }
}
