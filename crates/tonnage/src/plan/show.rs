//! A plan for people: what one rank reads, as text, and who reads what, as a picture.

use std::collections::HashMap;
use std::fmt::Write as _;

use tonnage_plan::io::{IoPlan, IoProfile, TensorIo, Way};
use tonnage_plan::{Layout, Local, Plan, Target};

use crate::error::Result;

/// Bytes for people.
fn size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KB", "MB", "GB", "TB"];
    let (mut value, mut unit) = (bytes as f64, 0);
    while value >= 999.5 && unit + 1 < UNITS.len() {
        (value, unit) = (value / 1000.0, unit + 1);
    }
    match unit {
        0 => format!("{bytes} B"),
        _ if value < 9.995 => format!("{value:.2} {}", UNITS[unit]),
        _ => format!("{value:.1} {}", UNITS[unit]),
    }
}

fn axes(plan: &Plan, rank: u32) -> String {
    let mesh = plan.mesh();
    let named = mesh
        .axes()
        .iter()
        .filter_map(|(name, _)| Some(format!("{name}={}", mesh.coordinate(rank, name).ok()?)));
    named.collect::<Vec<_>>().join(", ")
}

/// Which part of a target a local tensor is: the first box, and how many more there are.
fn part(layout: &Layout, global: &[u64]) -> String {
    let Some(first) = layout.boxes.first() else {
        return "zeros".to_owned();
    };
    if layout.boxes.len() == 1 && &*first.size == global {
        return "all".to_owned();
    }
    let dims = first.global.iter().zip(&first.size).zip(global);
    let dims = dims.map(|((&begin, &len), &all)| match len == all {
        true => ":".to_owned(),
        false => format!("{begin}:{}", begin.saturating_add(len)),
    });
    let text = format!("[{}]", dims.collect::<Vec<_>>().join(", "));
    match layout.boxes.len() {
        1 => text,
        more => format!("{text} and {} more", more - 1),
    }
}

/// What a rank reads, as text: totals, and a line for each tensor.
///
/// # Errors
/// `PLAN_MESH` for a rank that the mesh has not.
pub fn explain(plan: &Plan, rank: u32, io: &IoPlan) -> Result<String> {
    let locals = plan.rank(rank)?;
    let files: std::collections::BTreeSet<usize> =
        io.reads.iter().map(tonnage_plan::io::Read::file).collect();
    let mut text = String::new();
    // Writing to a string never fails.
    let _ = writeln!(
        text,
        "rank {rank} of {} ({}): {} tensors, {} needed, {} read ({:.2}x) in {} requests from {} of {} files",
        plan.mesh().size(),
        axes(plan, rank),
        locals.len(),
        size(io.needed),
        size(io.read),
        io.amplification(),
        io.requests(),
        files.len(),
        plan.files().len(),
    );
    let rows = locals
        .iter()
        .zip(&io.tensors)
        .map(|(local, tensor)| row(plan, local, tensor));
    let rows: Vec<[String; 6]> = rows.collect();
    let mut widths = [0; 6];
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    for row in &rows {
        let cells = row.iter().zip(widths);
        let cells = cells.map(|(cell, width)| format!("{cell:width$}"));
        let _ = writeln!(
            text,
            "  {}",
            cells.collect::<Vec<_>>().join("  ").trim_end()
        );
    }
    Ok(text)
}

fn row(plan: &Plan, local: &Local, tensor: &TensorIo) -> [String; 6] {
    let target = plan.targets().get(local.target as usize);
    let (global, cast) = target.map_or((&[][..], None), |target| (&*target.shape, target.cast));
    let dtype = match cast {
        None => local.dtype.to_string(),
        Some(to) => format!("{} as {to}", local.dtype),
    };
    let note = target.and_then(|target| target.note.as_deref());
    let note = note.unwrap_or_default().to_owned();
    let read = match tensor.way {
        Way::Nothing => "nothing is read".to_owned(),
        way => format!(
            "{} by {} ({:.2}x)",
            size(tensor.read),
            way.name(),
            tensor.amplification()
        ),
    };
    [
        local.name.to_string(),
        dtype,
        format!("{:?}", &*local.shape),
        part(local, global),
        read,
        note,
    ]
}

/// Columns of the picture at most.
const RANKS: u32 = 64;
/// Rows of the picture at most.
const ROWS: usize = 4000;

/// A page that needs nothing else: tensors by ranks, who reads which part of what, and how, with totals. Layers that
/// are alike share a row.
///
/// # Errors
/// Those of [`Plan::io`].
pub fn html(plan: &Plan, profile: &IoProfile) -> Result<String> {
    let ranks = plan.mesh().size();
    let mut totals = Vec::with_capacity(ranks as usize);
    // By target: what reading it comes to, for the ranks that are shown.
    let mut ways: HashMap<(u32, u32), TensorIo> = HashMap::new();
    for rank in 0..ranks {
        let io = plan.io(rank, profile)?;
        if rank < RANKS {
            let locals = plan.rank(rank)?;
            let tensors = locals.iter().zip(&io.tensors);
            ways.extend(tensors.map(|(local, tensor)| ((local.target, rank), *tensor)));
        }
        totals.push((io.needed, io.read, io.requests()));
    }
    let shown = ranks.min(RANKS);
    let mut page = head(plan, profile, &totals);
    page.push_str("<table><thead><tr><th>tensor</th><th>dtype</th><th>shape</th>");
    for rank in 0..shown {
        let _ = write!(
            page,
            "<th>{rank}<br><small>{}</small></th>",
            escaped(&axes(plan, rank))
        );
    }
    page.push_str("</tr></thead><tbody>\n");
    let groups = groups(plan, shown);
    for group in groups.iter().take(ROWS) {
        group_row(&mut page, group, shown, &ways);
    }
    page.push_str("</tbody><tfoot>");
    for (name, of) in [
        ("needed", 0),
        ("read", 1),
        ("read for each byte needed", 2),
        ("requests", 3),
    ] {
        let _ = write!(page, "<tr><th colspan=\"3\">{name}</th>");
        for &(needed, read, requests) in totals.iter().take(shown as usize) {
            let cell = match of {
                0 => size(needed),
                1 => size(read),
                2 if needed == 0 => "–".to_owned(),
                2 => format!("{:.2}x", read as f64 / needed as f64),
                _ => requests.to_string(),
            };
            let _ = write!(page, "<td>{cell}</td>");
        }
        page.push_str("</tr>");
    }
    page.push_str("</tfoot></table>\n");
    if groups.len() > ROWS || ranks > RANKS {
        let _ = writeln!(
            page,
            "<p>Shown are {} of {} rows and {shown} of {ranks} ranks.</p>",
            groups.len().min(ROWS),
            groups.len()
        );
    }
    page.push_str("</body></html>\n");
    Ok(page)
}

const STYLE: &str = "\
body{font:14px/1.4 system-ui,sans-serif;margin:2em;color:#1c2430;background:#fff}\
h1{font-size:1.3em;margin:0 0 .3em}p{margin:.3em 0}code{font-size:.9em}\
table{border-collapse:collapse;margin-top:1em}\
th,td{padding:2px 6px;text-align:center;font-variant-numeric:tabular-nums}\
thead th{position:sticky;top:0;background:#fff;border-bottom:1px solid #9aa4b2;vertical-align:bottom}\
tbody td:first-child,tfoot th{text-align:left;font-weight:normal}\
tbody td:first-child{font-family:ui-monospace,monospace;font-size:12px;white-space:nowrap}\
tbody tr:hover{background:#f2f5f9}tfoot tr:first-child>*{border-top:1px solid #9aa4b2}\
small{color:#5b6675}svg{display:block;margin:auto}\
.frame{fill:#f4f6f8;stroke:#c5ccd6}.ranges{fill:#2a9d72}.runs{fill:#3574c4}.blocks{fill:#d98324}\
.nothing{fill:#b9c0ca}.key{display:inline-block;width:.8em;height:.8em;margin:0 .3em 0 1em}";

fn head(plan: &Plan, profile: &IoProfile, totals: &[(u64, u64, u64)]) -> String {
    let (needed, read) = totals.iter().fold((0_u64, 0_u64), |(needed, read), one| {
        (needed.saturating_add(one.0), read.saturating_add(one.1))
    });
    let files: u64 = plan.files().iter().map(|file| file.len).sum();
    let axes: Vec<String> = (plan.mesh().axes().iter())
        .map(|(name, size)| format!("{name}={size}"))
        .collect();
    let digest: String = plan
        .digest()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let key = |class: &str, color: &str, text: &str| {
        format!("<span class=\"key\" style=\"background:{color}\"></span>{class}: {text}")
    };
    format!(
        "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>Plan: {mesh}</title>\
         <style>{STYLE}</style></head><body>\n<h1>Who reads what: {mesh}</h1>\n\
         <p>{targets} tensors, {count} ({files}), {ranks} ranks: {needed} needed, {read} read \
         ({ratio:.2}x, as from {profile}).</p>\n<p>{ranges}{runs}{blocks}{nothing}</p>\n\
         <p>Each square is a tensor: from top to bottom its first dimension, from left to right its last. \
         Digest <code>{digest}</code></p>\n",
        mesh = escaped(&axes.join(", ")),
        targets = plan.targets().len(),
        count = match plan.files().len() {
            1 => "1 file".to_owned(),
            many => format!("{many} files"),
        },
        files = size(files),
        ranks = plan.mesh().size(),
        needed = size(needed),
        read = size(read),
        ratio = read as f64 / needed.max(1) as f64,
        profile = profile.name,
        ranges = key("ranges", "#2a9d72", "read straight into place"),
        runs = key("runs", "#3574c4", "each run for itself"),
        blocks = key("blocks", "#d98324", "read whole, copied from"),
        nothing = key("nothing", "#b9c0ca", "zeros"),
    )
}

/// Targets that differ in numbers of their names only, and are alike on every rank that is shown.
struct Group<'a> {
    pattern: String,
    first: usize,
    target: &'a Target,
    count: usize,
}

fn groups(plan: &Plan, shown: u32) -> Vec<Group<'_>> {
    let mut made: Vec<Group<'_>> = Vec::new();
    let mut known: HashMap<String, Vec<usize>> = HashMap::new();
    for (at, target) in plan.targets().iter().enumerate() {
        let pattern = pattern(&target.name);
        let alike = known.entry(pattern.clone()).or_default();
        let same = alike.iter().copied().find(|&group| {
            made.get(group)
                .is_some_and(|group: &Group<'_>| is_alike(group.target, target, shown))
        });
        match same.and_then(|group| made.get_mut(group)) {
            Some(group) => group.count += 1,
            None => {
                alike.push(made.len());
                made.push(Group {
                    pattern,
                    first: at,
                    target,
                    count: 1,
                });
            }
        }
    }
    made
}

fn is_alike(a: &Target, b: &Target, shown: u32) -> bool {
    (a.dtype, a.cast, &a.shape) == (b.dtype, b.cast, &b.shape)
        && (0..shown).all(|rank| match (a.layout(rank), b.layout(rank)) {
            (None, None) => true,
            (Some(a), Some(b)) => a.boxes == b.boxes && a.shape == b.shape,
            _ => false,
        })
}

/// A name with `*` for each of its numbers.
fn pattern(name: &str) -> String {
    let parts = name.split('.').map(|part| {
        let number = !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
        if number { "*" } else { part }
    });
    parts.collect::<Vec<_>>().join(".")
}

fn group_row(
    page: &mut String,
    group: &Group<'_>,
    shown: u32,
    ways: &HashMap<(u32, u32), TensorIo>,
) {
    let target = group.target;
    let name = match group.count {
        1 => escaped(&target.name),
        many => format!("{} <small>×{many}</small>", escaped(&group.pattern)),
    };
    let _ = write!(
        page,
        "<tr><td>{name}</td><td>{}</td><td>{}</td>",
        target.dtype,
        escaped(&format!("{:?}", &*target.shape))
    );
    for rank in 0..shown {
        match target.layout(rank) {
            None => page.push_str("<td></td>"),
            Some(layout) => {
                let way = ways
                    .get(&(group.first as u32, rank))
                    .copied()
                    .unwrap_or_default();
                let _ = write!(page, "<td>{}</td>", square(target, layout, &way));
            }
        }
    }
    page.push_str("</tr>\n");
}

/// Boxes of one square at most; more would be a pattern that nobody sees.
const BOXES: usize = 64;
const SIDE: f64 = 26.0;

fn square(target: &Target, layout: &Layout, io: &TensorIo) -> String {
    let mut text = format!(
        "<svg width=\"{0}\" height=\"{0}\" viewBox=\"0 0 {0} {0}\">",
        SIDE + 2.0
    );
    let _ = write!(
        text,
        "<title>{}: {} of shape {}, {} needed, {} read by {}</title>",
        escaped(&target.name),
        escaped(&part(layout, &target.shape)),
        escaped(&format!("{:?}", &*layout.shape)),
        size(io.needed),
        size(io.read),
        io.way.name(),
    );
    let _ = write!(
        text,
        "<rect class=\"frame\" x=\"0.5\" y=\"0.5\" width=\"{0}\" height=\"{0}\"/>",
        SIDE + 1.0
    );
    let all = |dim: Option<usize>| dim.and_then(|dim| target.shape.get(dim)).copied();
    let last = target.shape.len().checked_sub(1);
    let (down, across) = match last {
        Some(last) if last > 0 => (Some(0), Some(last)),
        _ => (None, last),
    };
    for region in layout.boxes.iter().take(BOXES) {
        let span = |dim: Option<usize>| -> (f64, f64) {
            let (Some(dim), Some(all)) = (dim, all(dim).filter(|&all| all > 0)) else {
                return (0.0, SIDE);
            };
            let (Some(&begin), Some(&len)) = (region.global.get(dim), region.size.get(dim)) else {
                return (0.0, SIDE);
            };
            let scale = SIDE / all as f64;
            (begin as f64 * scale, (len as f64 * scale).max(0.6))
        };
        let ((x, width), (y, height)) = (span(across), span(down));
        let _ = write!(
            text,
            "<rect class=\"{}\" x=\"{:.2}\" y=\"{:.2}\" width=\"{width:.2}\" height=\"{height:.2}\"/>",
            io.way.name(),
            x + 1.0,
            y + 1.0,
        );
    }
    text.push_str("</svg>");
    text
}

fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for one in text.chars() {
        match one {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            one if one.is_control() => out.push('\u{fffd}'),
            one => out.push(one),
        }
    }
    out
}
