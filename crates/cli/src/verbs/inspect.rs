//! `inspect`: what is in a checkpoint, at a glance.

use std::collections::BTreeMap;
use std::io::Write;
use std::ops::Deref;

use serde_json::{Value, json};
use tonnage::gguf::{ByteOrder, GgufTensor};
use tonnage::stats::{Stats, Summary, block_bytes};
use tonnage::{Checkpoint, Layout, TensorRef};

use crate::args::{Common, Inspect};
use crate::exit::{Failure, OK};
use crate::glob::Selection;
use crate::table::{Side, Table};
use crate::terminal::{Bar, Out, cancel};
use crate::tree::{Leaf, Node, tree};
use crate::{json, text};

/// Runs the verb.
pub fn run(args: &Inspect, common: &Common, out: &mut Out) -> Result<u8, Failure> {
    let checkpoint = super::open(&args.path, common)?;
    let selection = Selection::new(&args.select);
    let chosen: Vec<Look<'_>> = checkpoint
        .iter_by_name()
        .filter(|tensor| selection.has(tensor.name()))
        .map(|tensor| Look::of(&checkpoint, tensor))
        .collect();
    if chosen.is_empty() && !args.select.is_empty() {
        return Err(selection.nothing(checkpoint.names()));
    }
    let stats = if args.stats {
        Some(summaries(&checkpoint, &chosen)?)
    } else {
        None
    };
    if common.json {
        json::write(out, &report(args, &checkpoint, &chosen, stats.as_deref()))?;
        return Ok(OK);
    }
    summary(args, &checkpoint, &chosen, out)?;
    if chosen.is_empty() {
        return Ok(OK);
    }
    writeln!(out)?;
    let colour = out.colour();
    match &stats {
        Some(stats) => values(&chosen, stats).write(out, colour)?,
        None if args.flat => flat(&checkpoint, &chosen).write(out, colour)?,
        None => modules(&chosen, !args.full).write(out, colour)?,
    }
    Ok(OK)
}

/// A tensor as it is shown: blocks of a GGUF file by their type and their elements, not as the bytes that
/// they are stored as.
struct Look<'a> {
    tensor: TensorRef<'a>,
    blocks: Option<GgufTensor<'a>>,
}

impl<'a> Look<'a> {
    fn of(checkpoint: &'a Checkpoint, tensor: TensorRef<'a>) -> Self {
        let gguf = checkpoint.gguf();
        Look {
            tensor,
            blocks: gguf.and_then(|files| files.get(tensor.name())),
        }
    }

    fn dtype_name(&self) -> &'a str {
        match &self.blocks {
            Some(blocks) => blocks.ty.name(),
            None => self.tensor.dtype_name(),
        }
    }

    fn shape(&self) -> &'a [u64] {
        match &self.blocks {
            Some(blocks) => blocks.logical_shape,
            None => self.tensor.shape(),
        }
    }

    fn elements(&self) -> u64 {
        match &self.blocks {
            Some(blocks) => blocks.elements(),
            None => self.tensor.elements(),
        }
    }
}

impl<'a> Deref for Look<'a> {
    type Target = TensorRef<'a>;

    fn deref(&self) -> &TensorRef<'a> {
        &self.tensor
    }
}

/// Streams every chosen tensor once, in constant memory. Unknown dtypes have no summary.
fn summaries(
    checkpoint: &Checkpoint,
    chosen: &[Look<'_>],
) -> Result<Vec<Option<Summary>>, Failure> {
    let cancel = cancel();
    let bar = Bar::new(
        "reading",
        chosen.iter().map(|tensor| tensor.byte_len()).sum(),
    );
    let mut all = Vec::with_capacity(chosen.len());
    for tensor in chosen {
        let Ok(dtype) = tensor.dtype() else {
            all.push(None);
            continue;
        };
        let mut stats = Stats::new(dtype);
        let mut blocks = super::Blocks::new(checkpoint, tensor, 8 * block_bytes(dtype));
        while let Some(block) = blocks.next()? {
            if cancel.is_cancelled() {
                return Err(Failure::Cancelled);
            }
            stats.update(block);
            bar.add(block.len() as u64);
        }
        all.push(Some(stats.finish()));
    }
    Ok(all)
}

fn layout_name(layout: Layout) -> &'static str {
    match layout {
        Layout::Single => "single",
        Layout::Indexed => "indexed",
        Layout::FileSet => "file_set",
        _ => "bytes",
    }
}

/// Tensors, elements and bytes of each dtype, the largest first.
fn dtypes<'a>(chosen: &[Look<'a>]) -> Vec<(&'a str, u64, u64, u64)> {
    let mut by_name: BTreeMap<&str, (u64, u64, u64)> = BTreeMap::new();
    for tensor in chosen {
        let (count, elements, bytes) = by_name.entry(tensor.dtype_name()).or_default();
        *count += 1;
        *elements = elements.saturating_add(tensor.elements());
        *bytes += tensor.byte_len();
    }
    let mut rows: Vec<_> = by_name
        .into_iter()
        .map(|(name, (n, e, b))| (name, n, e, b))
        .collect();
    rows.sort_by_key(|row| std::cmp::Reverse(row.3));
    rows
}

fn totals(chosen: &[Look<'_>]) -> (u64, u64) {
    let elements = chosen
        .iter()
        .map(Look::elements)
        .fold(0, u64::saturating_add);
    (
        elements,
        chosen.iter().map(|tensor| tensor.byte_len()).sum(),
    )
}

fn summary(
    args: &Inspect,
    checkpoint: &Checkpoint,
    chosen: &[Look<'_>],
    out: &mut Out,
) -> Result<(), Failure> {
    /// Metadata values can be whole documents.
    const LONGEST_VALUE: usize = 100;
    const MOST_KEYS: usize = 24;
    let (elements, bytes) = totals(chosen);
    let files = checkpoint.files();
    let kind = match checkpoint.layout() {
        Layout::Indexed => format!("{} with an index", text::plural(files.len() as u64, "file")),
        _ => text::plural(files.len() as u64, "file"),
    };
    let on_disk: u64 = files.iter().map(|file| file.len).sum();
    let path = args.path.to_string_lossy();
    writeln!(
        out,
        "{} · {kind}, {}",
        text::name(&path),
        text::size(on_disk)
    )?;
    let of = if chosen.len() < checkpoint.len() {
        format!(" of {} (selected)", text::grouped(checkpoint.len() as u64))
    } else {
        String::new()
    };
    writeln!(
        out,
        "  tensors     {}{of}",
        text::grouped(chosen.len() as u64)
    )?;
    let exact = if elements >= 10_000 {
        format!(" ({})", text::grouped(elements))
    } else {
        String::new()
    };
    writeln!(out, "  parameters  {}{exact}", text::count(elements))?;
    let exact = if bytes >= 1024 {
        format!(" ({} bytes)", text::grouped(bytes))
    } else {
        String::new()
    };
    writeln!(out, "  data        {}{exact}", text::size(bytes))?;
    for (i, (name, count, _, bytes_of)) in dtypes(chosen).into_iter().enumerate() {
        let title = if i == 0 { "dtypes" } else { "" };
        let share = match bytes_of as f64 * 100.0 / bytes.max(1) as f64 {
            little if little > 0.0 && little < 0.05 => "< 0.1".to_owned(),
            share => format!("{share:.1}"),
        };
        writeln!(
            out,
            "  {title:<10}  {} {}, {}, {share} %",
            text::name(name),
            text::plural(count, "tensor"),
            text::size(bytes_of)
        )?;
    }
    if let Some(first) = checkpoint.gguf().and_then(|files| files.files().first()) {
        let order = match first.byte_order() {
            ByteOrder::Little => "",
            ByteOrder::Big => ", big-endian",
        };
        let (version, alignment) = (first.version(), first.alignment());
        writeln!(
            out,
            "  gguf        version {version}{order}, alignment {alignment}"
        )?;
    }
    let metadata = checkpoint.metadata();
    for (i, (key, value)) in metadata.iter().take(MOST_KEYS).enumerate() {
        let title = if i == 0 { "metadata" } else { "" };
        let (short, more) = match value.char_indices().nth(LONGEST_VALUE) {
            Some((cut, _)) => (
                value.get(..cut).unwrap_or(value),
                format!("… ({} bytes)", value.len()),
            ),
            None => (value.as_str(), String::new()),
        };
        writeln!(
            out,
            "  {title:<10}  {} = {}{more}",
            text::name(key),
            text::name(short)
        )?;
    }
    if metadata.len() > MOST_KEYS {
        writeln!(out, "  {:<10}  … {} more", "", metadata.len() - MOST_KEYS)?;
    }
    for (i, note) in checkpoint.notes().iter().enumerate() {
        let title = if i == 0 { "notes" } else { "" };
        writeln!(out, "  {title:<10}  {}", text::line(&note.text))?;
    }
    Ok(())
}

const COLUMNS: [(&str, Side); 5] = [
    ("name", Side::Left),
    ("dtype", Side::Left),
    ("shape", Side::Left),
    ("params", Side::Right),
    ("size", Side::Right),
];

fn modules(chosen: &[Look<'_>], collapse: bool) -> Table {
    let leaves = chosen.iter().map(|tensor| Leaf {
        name: tensor.name(),
        dtype: tensor.dtype_name(),
        shape: tensor.shape(),
        elements: tensor.elements(),
        bytes: tensor.byte_len(),
    });
    let mut table = Table::new(&COLUMNS);
    rows(&tree(leaves, collapse), 0, &mut table);
    table
}

fn rows(nodes: &[Node<'_>], depth: usize, table: &mut Table) {
    for node in nodes {
        let label = format!("{}{}", "  ".repeat(depth), text::name(&node.label));
        let times = if node.times > 1 {
            format!("{} × ", node.times)
        } else {
            String::new()
        };
        let (params, size) = (text::count(node.elements), text::size(node.bytes));
        match &node.leaf {
            Some(leaf) if node.children.is_empty() => {
                let (dtype, shape) = (text::name(leaf.dtype).into_owned(), text::shape(leaf.shape));
                table.row(vec![
                    label,
                    dtype,
                    shape,
                    times.clone() + &params,
                    times + &size,
                ]);
            }
            leaf => {
                let cells = [
                    String::new(),
                    String::new(),
                    times.clone() + &params,
                    times + &size,
                ];
                table.group(std::iter::once(label).chain(cells).collect());
                if let Some(leaf) = leaf {
                    // A tensor whose name is also that of a module.
                    let label = format!("{}(itself)", "  ".repeat(depth + 1));
                    let dtype = text::name(leaf.dtype).into_owned();
                    let (params, size) = (text::count(leaf.elements), text::size(leaf.bytes));
                    table.row(vec![label, dtype, text::shape(leaf.shape), params, size]);
                }
            }
        }
        rows(&node.children, depth + 1, table);
    }
}

fn flat(checkpoint: &Checkpoint, chosen: &[Look<'_>]) -> Table {
    let mut columns = COLUMNS.to_vec();
    let many = checkpoint.files().len() > 1;
    if many {
        columns.push(("file", Side::Left));
    }
    let mut table = Table::new(&columns);
    for tensor in chosen {
        let mut cells = vec![
            text::name(tensor.name()).into_owned(),
            text::name(tensor.dtype_name()).into_owned(),
            text::shape(tensor.shape()),
            text::count(tensor.elements()),
            text::size(tensor.byte_len()),
        ];
        if many {
            let file = tensor.file_label();
            let last = file.rsplit('/').next().unwrap_or(file);
            cells.push(text::name(last).into_owned());
        }
        table.row(cells);
    }
    table
}

fn values(chosen: &[Look<'_>], stats: &[Option<Summary>]) -> Table {
    let numbers = ["min", "max", "mean", "std", "zeros", "nan", "inf"];
    let mut columns = COLUMNS[..3].to_vec();
    columns.extend(numbers.map(|title| (title, Side::Right)));
    let mut table = Table::new(&columns);
    for (tensor, summary) in chosen.iter().zip(stats) {
        let mut cells = vec![
            text::name(tensor.name()).into_owned(),
            text::name(tensor.dtype_name()).into_owned(),
            text::shape(tensor.shape()),
        ];
        match summary {
            Some(s) => {
                cells.extend([s.min, s.max, s.mean, s.std].map(text::value));
                cells.extend([s.zeros, s.nan, s.inf].map(text::count));
            }
            None => cells.extend(numbers.map(|_| "-".to_owned())),
        }
        table.row(cells);
    }
    table
}

fn report(
    args: &Inspect,
    checkpoint: &Checkpoint,
    chosen: &[Look<'_>],
    stats: Option<&[Option<Summary>]>,
) -> Value {
    let (elements, bytes) = totals(chosen);
    let tensors: Vec<Value> = chosen
        .iter()
        .enumerate()
        .map(|(i, tensor)| {
            let mut row = json!({
                "name": tensor.name(), "dtype": tensor.dtype_name(), "shape": tensor.shape(),
                "parameters": tensor.elements(), "bytes": tensor.byte_len(),
                "file": tensor.file(), "offset": tensor.offset(),
            });
            if let (Some(_), Some(row)) = (&tensor.blocks, row.as_object_mut()) {
                row.insert(
                    "stored".to_owned(),
                    json!({
                        "dtype": tensor.tensor.dtype_name(), "shape": tensor.tensor.shape(),
                    }),
                );
            }
            let summary = stats
                .and_then(|all| all.get(i))
                .map(|summary| summary.map(summary_json));
            if let (Some(summary), Some(row)) = (summary, row.as_object_mut()) {
                row.insert("stats".to_owned(), summary.unwrap_or(Value::Null));
            }
            row
        })
        .collect();
    let files: Vec<Value> = checkpoint
        .files()
        .iter()
        .map(|file| {
            let metadata: Option<BTreeMap<_, _>> =
                file.metadata.as_ref().map(|pairs| pairs.iter().cloned().collect());
            json!({
                "path": file.label, "bytes": file.len, "data_start": file.data_start,
                "header_padding": file.header_padding, "tensors": file.tensors, "metadata": metadata,
            })
        })
        .collect();
    let dtypes: Vec<Value> = dtypes(chosen)
        .into_iter()
        .map(|(name, n, e, b)| json!({"dtype": name, "tensors": n, "parameters": e, "bytes": b}))
        .collect();
    let notes = checkpoint.notes();
    let notes: Vec<Value> = notes
        .iter()
        .map(|note| json!({"code": note.code, "text": note.text, "file": note.file}))
        .collect();
    json!({
        "schema": "tonnage.inspect/1",
        "path": args.path.to_string_lossy(),
        "layout": layout_name(checkpoint.layout()),
        "index": checkpoint.index_path().map(|path| path.to_string_lossy()),
        "tensor_count": chosen.len(), "parameters": elements, "bytes": bytes,
        "dtypes": dtypes, "metadata": checkpoint.metadata(), "files": files, "notes": notes,
        "tensors": tensors,
    })
}

fn summary_json(s: Summary) -> Value {
    json!({
        "count": s.count, "min": s.min, "max": s.max, "mean": s.mean, "std": s.std,
        "nan": s.nan, "inf": s.inf, "zeros": s.zeros,
    })
}
