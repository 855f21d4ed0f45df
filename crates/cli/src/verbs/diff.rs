//! `diff`: what two checkpoints have in common, and what not.

use std::collections::BTreeSet;
use std::io::Write;

use serde_json::{Value, json};
use tonnage::diff::{Difference, ValueDiff, block_lens};
use tonnage::{Checkpoint, TensorRef};

use crate::args::{Common, Diff};
use crate::exit::{FOUND, Failure, OK};
use crate::glob::Selection;
use crate::table::{Side, Table};
use crate::terminal::{Bar, Out, cancel};
use crate::{json, text};

/// What was found about one name.
enum Finding<'a> {
    OnlyA(TensorRef<'a>),
    OnlyB(TensorRef<'a>),
    Shape(TensorRef<'a>, TensorRef<'a>),
    Dtype(TensorRef<'a>, TensorRef<'a>, Option<Difference>),
    Values(TensorRef<'a>, Difference),
    /// The dtype is not known, so that only bytes can be compared, and they differ.
    Bytes(TensorRef<'a>),
}

/// Runs the verb.
pub fn run(args: &Diff, common: &Common, out: &mut Out) -> Result<u8, Failure> {
    let (a, b) = (super::open(&args.a, common)?, super::open(&args.b, common)?);
    let selection = Selection::new(&args.select);
    let names: BTreeSet<&str> = a
        .names()
        .chain(b.names())
        .filter(|name| selection.has(name))
        .collect();
    if names.is_empty() && !args.select.is_empty() {
        return Err(selection.nothing(a.names().chain(b.names())));
    }
    let pairs: Vec<_> = names
        .iter()
        .map(|name| (a.get(name), b.get(name)))
        .collect();
    let bar = Bar::new(
        "comparing",
        pairs
            .iter()
            .flat_map(|(a, _)| a)
            .map(TensorRef::byte_len)
            .sum(),
    );
    let mut findings = Vec::new();
    for pair in pairs {
        match pair {
            (Some(x), None) => findings.push(Finding::OnlyA(x)),
            (None, Some(y)) => findings.push(Finding::OnlyB(y)),
            (Some(x), Some(y)) => findings.extend(tensor(args, (&a, x), (&b, y), &bar)?),
            (None, None) => {}
        }
    }
    drop(bar);
    let metadata = metadata(&a, &b);
    let different = !findings.is_empty() || args.metadata && !metadata.is_empty();
    if common.json {
        json::write(
            out,
            &report(args, names.len(), different, &findings, &metadata),
        )?;
    } else {
        show(args, names.len(), &findings, &metadata, out)?;
    }
    Ok(if different { FOUND } else { OK })
}

fn tensor<'a>(
    args: &Diff,
    (a, x): (&Checkpoint, TensorRef<'a>),
    (b, y): (&Checkpoint, TensorRef<'a>),
    bar: &Bar,
) -> Result<Option<Finding<'a>>, Failure> {
    if x.shape() != y.shape() {
        bar.add(x.byte_len());
        return Ok(Some(Finding::Shape(x, y)));
    }
    let same = x.dtype_name() == y.dtype_name();
    let known = x.dtype().ok().zip(y.dtype().ok());
    let found = match known {
        _ if args.no_values => None,
        Some((left, right)) => {
            let mut diff = ValueDiff::new(left, right);
            let blocks = block_lens(left, right);
            blockwise((a, &x), (b, &y), blocks, bar, |left, right| {
                diff.update(left, right)
            })?;
            Some(diff.finish())
        }
        None if same => {
            let mut equal = x.byte_len() == y.byte_len();
            blockwise((a, &x), (b, &y), (1 << 20, 1 << 20), bar, |left, right| {
                equal &= left == right
            })?;
            return Ok((!equal).then_some(Finding::Bytes(x)));
        }
        None => None,
    };
    // What is within the tolerance counts as equal; where one side has no distance (NaN, infinity
    // against a number), no tolerance helps.
    let differs = |found: &Difference| {
        found.different > 0 && (found.max_abs > args.tolerance || found.not_finite > 0)
    };
    if !same && !args.ignore_dtype {
        return Ok(Some(Finding::Dtype(x, y, found)));
    }
    Ok(found.filter(differs).map(|found| Finding::Values(x, found)))
}

fn blockwise(
    (a, x): (&Checkpoint, &TensorRef<'_>),
    (b, y): (&Checkpoint, &TensorRef<'_>),
    (left, right): (usize, usize),
    bar: &Bar,
    mut each: impl FnMut(&[u8], &[u8]),
) -> Result<(), Failure> {
    /// Blocks a read.
    const TOGETHER: usize = 8;
    let cancel = cancel();
    let mut left = super::Blocks::new(a, x, left * TOGETHER);
    let mut right = super::Blocks::new(b, y, right * TOGETHER);
    while let (Some(left), Some(right)) = (left.next()?, right.next()?) {
        if cancel.is_cancelled() {
            return Err(Failure::Cancelled);
        }
        each(left, right);
        bar.add(left.len() as u64);
    }
    Ok(())
}

/// Keys whose values differ, with both.
fn metadata<'a>(
    a: &'a Checkpoint,
    b: &'a Checkpoint,
) -> Vec<(&'a str, Option<&'a str>, Option<&'a str>)> {
    let (a, b) = (a.metadata(), b.metadata());
    let keys: BTreeSet<&String> = a.keys().chain(b.keys()).collect();
    keys.into_iter()
        .map(|key| {
            (
                key.as_str(),
                a.get(key).map(String::as_str),
                b.get(key).map(String::as_str),
            )
        })
        .filter(|(_, a, b)| a != b)
        .collect()
}

fn show(
    args: &Diff,
    compared: usize,
    findings: &[Finding<'_>],
    metadata: &[(&str, Option<&str>, Option<&str>)],
    out: &mut Out,
) -> Result<(), Failure> {
    let (a, b) = (args.a.to_string_lossy(), args.b.to_string_lossy());
    let columns = [
        ("name", Side::Left),
        ("difference", Side::Left),
        ("elements", Side::Right),
        ("max |a-b|", Side::Right),
        ("mean |a-b|", Side::Right),
    ];
    let mut table = Table::new(&columns);
    for finding in findings {
        table.row(cells(finding));
    }
    let colour = out.colour();
    if !findings.is_empty() {
        table.write(out, colour)?;
        writeln!(out)?;
    }
    for (key, a, b) in metadata {
        let side = |value: &Option<&str>| value.map_or("nothing".into(), text::name).into_owned();
        writeln!(
            out,
            "metadata {}: {} → {}",
            text::name(key),
            side(a),
            side(b)
        )?;
    }
    let what = text::plural(compared as u64, "tensor");
    let how = if args.no_values {
        "in name, dtype and shape"
    } else {
        "in every value"
    };
    let (a, b) = (text::name(&a), text::name(&b));
    match findings.len() {
        0 => writeln!(out, "equal: {a} and {b}, {what} {how}")?,
        n => writeln!(
            out,
            "different: {a} and {b}, {} of {what}",
            text::grouped(n as u64)
        )?,
    }
    Ok(())
}

fn cells(finding: &Finding<'_>) -> Vec<String> {
    let name = |tensor: &TensorRef<'_>| text::name(tensor.name()).into_owned();
    let dtype = |tensor: &TensorRef<'_>| text::name(tensor.dtype_name()).into_owned();
    let (name, what, found) = match finding {
        Finding::OnlyA(x) => (
            name(x),
            format!("only in A: {} {}", dtype(x), text::shape(x.shape())),
            None,
        ),
        Finding::OnlyB(y) => (
            name(y),
            format!("only in B: {} {}", dtype(y), text::shape(y.shape())),
            None,
        ),
        Finding::Shape(x, y) => {
            let (x_shape, y_shape) = (text::shape(x.shape()), text::shape(y.shape()));
            (name(x), format!("shape {x_shape} → {y_shape}"), None)
        }
        Finding::Dtype(x, y, found) => (
            name(x),
            format!("dtype {} → {}", dtype(x), dtype(y)),
            found.as_ref(),
        ),
        Finding::Values(x, found) => (name(x), format!("values, {}", dtype(x)), Some(found)),
        Finding::Bytes(x) => (name(x), format!("bytes, {}", dtype(x)), None),
    };
    let mut cells = vec![name, what];
    match found {
        Some(found) => cells.extend([
            format!(
                "{} of {}",
                text::grouped(found.different),
                text::grouped(found.count)
            ),
            text::value(Some(found.max_abs)),
            text::value(Some(found.mean_abs)),
        ]),
        None => cells.extend([String::new(), String::new(), String::new()]),
    }
    cells
}

fn report(
    args: &Diff,
    compared: usize,
    different: bool,
    findings: &[Finding<'_>],
    metadata: &[(&str, Option<&str>, Option<&str>)],
) -> Value {
    let side =
        |tensor: &TensorRef<'_>| json!({"dtype": tensor.dtype_name(), "shape": tensor.shape()});
    let values = |found: &Difference| {
        json!({
            "elements": found.count, "different": found.different, "max_abs": found.max_abs,
            "mean_abs": found.mean_abs, "not_finite": found.not_finite,
        })
    };
    let tensors: Vec<Value> = findings
        .iter()
        .map(|finding| match finding {
            Finding::OnlyA(x) => json!({"name": x.name(), "kind": "only_a", "a": side(x)}),
            Finding::OnlyB(y) => json!({"name": y.name(), "kind": "only_b", "b": side(y)}),
            Finding::Shape(x, y) => json!({"name": x.name(), "kind": "shape", "a": side(x), "b": side(y)}),
            Finding::Dtype(x, y, found) => json!({
                "name": x.name(), "kind": "dtype", "a": side(x), "b": side(y), "values": found.as_ref().map(values),
            }),
            Finding::Values(x, found) => json!({"name": x.name(), "kind": "values", "values": values(found)}),
            Finding::Bytes(x) => json!({"name": x.name(), "kind": "bytes"}),
        })
        .collect();
    let metadata: Vec<Value> = metadata
        .iter()
        .map(|(key, a, b)| json!({"key": key, "a": a, "b": b}))
        .collect();
    json!({
        "schema": "tonnage.diff/1",
        "a": args.a.to_string_lossy(), "b": args.b.to_string_lossy(),
        "equal": !different, "compared": compared, "values": !args.no_values,
        "tensors": tensors, "metadata": metadata,
    })
}
