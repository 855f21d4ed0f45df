//! The report as one HTML file: charts as inline SVG, the values as tables, nothing from elsewhere.

use std::fmt::Write;

use super::report::{Limit, Report, Who, duration, speed};

/// Widths in the drawing's units: names, bars, values.
const NAMES: f64 = 300.0;
const BARS: f64 = 420.0;
const VALUES: f64 = 120.0;
/// Height of a bar, and of a bar with the room around it.
const BAR: f64 = 16.0;
const STEP: f64 = 22.0;

const STYLE: &str = "
:root { color-scheme: light dark; --ink: #1c2024; --faint: #60646c; --line: #d9d9e0; --paper: #ffffff;
  --tonnage: #2a6fdb; --reference: #a0a6ae; --limit: #c2410c; --machine: #6b8f71; }
@media (prefers-color-scheme: dark) { :root { --ink: #edeef0; --faint: #b0b4ba; --line: #43484e;
  --paper: #16181b; --tonnage: #6ea8ff; --reference: #7b838d; --limit: #fb8c4e; --machine: #8fb996; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
pre { color: var(--faint); white-space: pre-wrap; }
svg { width: 100%; height: auto; } svg text { fill: var(--ink); font: 13px system-ui, sans-serif; }
svg .faint { fill: var(--faint); }
.tonnage { fill: var(--tonnage); } .reference { fill: var(--reference); } .machine { fill: var(--machine); }
.limit { stroke: var(--limit); stroke-width: 2; stroke-dasharray: 4 2; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--faint); font-weight: 500; } .number { text-align: right; white-space: nowrap; }
";

/// Text with what HTML would read as its own made harmless; and what a terminal would, for who prints it.
fn escape(text: &str) -> String {
    let text = crate::text::line(text);
    let mut safe = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => safe.push_str("&amp;"),
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '"' => safe.push_str("&quot;"),
            '\'' => safe.push_str("&#39;"),
            c => safe.push(c),
        }
    }
    safe
}

struct Bar {
    name: String,
    class: &'static str,
    speed: f64,
    value: String,
    /// Where the limit is.
    limit: Option<f64>,
}

/// Bars one under the other, on one scale that begins at nothing.
fn bars(title: &str, bars: &[Bar]) -> String {
    let top = bars
        .iter()
        .flat_map(|bar| [bar.speed, bar.limit.unwrap_or(0.0)])
        .fold(0.0, f64::max);
    let scale = if top > 0.0 { BARS / top } else { 0.0 };
    let (width, height) = (NAMES + BARS + VALUES, bars.len() as f64 * STEP + 6.0);
    let mut svg = format!(
        "<svg viewBox=\"0 0 {width} {height}\" role=\"img\" aria-label=\"{}\">\n",
        escape(title)
    );
    for (number, bar) in bars.iter().enumerate() {
        let y = number as f64 * STEP + 3.0;
        let (length, base) = ((bar.speed * scale).max(1.0), y + BAR - 3.5);
        let (name, value) = (escape(&bar.name), escape(&bar.value));
        let _ = writeln!(
            svg,
            "<g><title>{name}: {value}</title>\
             <text class=\"faint\" x=\"{:.1}\" y=\"{base:.1}\" text-anchor=\"end\">{name}</text>\
             <rect class=\"{}\" x=\"{NAMES}\" y=\"{y:.1}\" width=\"{length:.1}\" height=\"{BAR}\" rx=\"2\"/>",
            NAMES - 8.0,
            bar.class,
        );
        let mut end = NAMES + length;
        if let Some(limit) = bar.limit {
            let x = NAMES + limit * scale;
            let (above, below) = (y - 2.0, y + BAR + 2.0);
            let _ = writeln!(
                svg,
                "<line class=\"limit\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{above:.1}\" y2=\"{below:.1}\"/>"
            );
            end = end.max(x);
        }
        let _ = writeln!(
            svg,
            "<text x=\"{:.1}\" y=\"{base:.1}\">{value}</text></g>",
            end + 6.0
        );
    }
    svg.push_str("</svg>\n");
    svg
}

fn loads(report: &Report) -> Vec<Bar> {
    let bar = |loads: &super::report::Loads| {
        let speed = loads.speed()?;
        let class = loads.who.name();
        let limit = report
            .of_limit(loads)
            .filter(|&part| part > 0.0)
            .map(|part| speed / part);
        Some(Bar {
            name: format!(
                "{} to {}, {}",
                loads.state.name(),
                loads.to,
                loads.who.name()
            ),
            class,
            speed,
            value: format!("{speed:.2} GB/s"),
            limit,
        })
    };
    report.loads.iter().filter_map(bar).collect()
}

fn limits(report: &Report) -> Vec<Bar> {
    let bar = |limit: &Limit| {
        let speed = limit.speed()?;
        let (name, value) = (limit.name.clone(), format!("{speed:.2} GB/s"));
        Some(Bar {
            name,
            class: "machine",
            speed,
            value,
            limit: None,
        })
    };
    report.limits.iter().filter_map(bar).collect()
}

fn row(cells: &[(&str, &str)], tag: &str) -> String {
    let cell =
        |(class, text): &(&str, &str)| format!("<{tag} class=\"{class}\">{}</{tag}>", escape(text));
    format!("<tr>{}</tr>\n", cells.iter().map(cell).collect::<String>())
}

fn tables(report: &Report) -> String {
    let mut html = String::from("<h2>Values</h2>\n<div class=\"scroll\"><table>\n");
    let head = [
        "load",
        "who",
        "time",
        "GB/s",
        "of the limit",
        "× reference",
        "rounds",
        "way",
    ];
    html += &row(&head.map(|title| ("", title)), "th");
    for loads in &report.loads {
        let part = report
            .of_limit(loads)
            .map_or_else(String::new, |part| format!("{:.0} %", part * 100.0));
        let ratio = report
            .against_reference(loads)
            .filter(|_| loads.who == Who::Tonnage);
        let way = match (&loads.failed, &loads.strategy) {
            (Some(why), _) => format!("failed: {why}"),
            (None, Some((strategy, reason))) => format!("{strategy}: {reason}"),
            (None, None) => String::new(),
        };
        html += &row(
            &[
                ("", &format!("{} to {}", loads.state.name(), loads.to)),
                ("", loads.who.name()),
                ("number", &loads.median().map_or_else(String::new, duration)),
                ("number", &speed(loads.speed())),
                ("number", &part),
                (
                    "number",
                    &ratio.map_or_else(String::new, |ratio| format!("{ratio:.2}")),
                ),
                ("number", &loads.seconds.len().to_string()),
                ("", way.trim_end_matches([':', ' '])),
            ],
            "td",
        );
    }
    html += "</table></div>\n<div class=\"scroll\"><table>\n";
    html += &row(&[("", "this machine"), ("number", "GB/s")], "th");
    for limit in &report.limits {
        html += &row(
            &[("", &limit.name), ("number", &speed(limit.speed()))],
            "td",
        );
    }
    html + "</table></div>\n"
}

/// The whole file.
pub fn html(report: &Report) -> String {
    let heading: String = report
        .heading()
        .iter()
        .map(|line| escape(line) + "\n")
        .collect();
    let notes: String = report
        .notes
        .iter()
        .map(|note| format!("<p>Note: {}</p>\n", escape(note)))
        .collect();
    format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width\">\n<title>tonnage bench: {title}</title>\n\
         <style>{STYLE}</style></head>\n<body>\n<h1>Loading {title}</h1>\n<pre>{heading}</pre>\n\
         <h2>Loads</h2>\n<p>Gigabytes a second, the median of the rounds; a load to the host ends when every \
         byte has been read once, a load to a device when the last copy is over. The dashed line is what bounds \
         that load on this machine.</p>\n{loads}\n<h2>This machine</h2>\n{limits}\n{notes}{tables}</body></html>\n",
        title = escape(&report.path),
        loads = bars("loads in GB/s", &loads(report)),
        limits = bars("limits of this machine in GB/s", &limits(report)),
        tables = tables(report),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_in_a_name_is_markup() {
        assert_eq!(
            escape("<b a='\"'>&\u{1b}"),
            "&lt;b a=&#39;&quot;&#39;&gt;&amp;\\u{1b}"
        );
    }

    #[test]
    fn bars_share_a_scale_that_holds_their_limits() {
        let bar = |speed, limit| Bar {
            name: "a<b".to_owned(),
            class: "tonnage",
            speed,
            value: String::new(),
            limit,
        };
        let svg = bars("t", &[bar(1.0, Some(4.0)), bar(2.0, None)]);
        assert!(
            svg.contains("width=\"105.0\"") && svg.contains("width=\"210.0\""),
            "{svg}"
        );
        assert!(
            svg.contains("x1=\"720.0\"") && !svg.contains("a<b"),
            "{svg}"
        );
        assert!(bars("none", &[]).contains("</svg>"));
    }
}
