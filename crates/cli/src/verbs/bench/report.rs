//! What was measured, as JSON and as text.

use std::io::Write;

use serde_json::{Value, json};

use super::machine::Description;
use crate::exit::Failure;
use crate::table::{Side, Table};
use crate::terminal::Out;
use crate::text;

/// What the machine can do: a speed, of several samples.
#[derive(Debug)]
pub struct Limit {
    /// `memory`, `disk`, `page cache`, or a device.
    pub group: String,
    /// What was done.
    pub name: String,
    /// Bytes and seconds of each round.
    samples: Vec<(u64, f64)>,
}

impl Limit {
    /// Nothing measured yet.
    pub fn new(group: impl Into<String>, name: String) -> Self {
        Limit {
            group: group.into(),
            name,
            samples: Vec::new(),
        }
    }

    /// A round.
    pub fn add(&mut self, bytes: u64, seconds: f64) {
        if bytes > 0 && seconds > 0.0 {
            self.samples.push((bytes, seconds));
        }
    }

    /// Gigabytes (10^9) a second: the median of the rounds; nothing where there was none.
    pub fn speed(&self) -> Option<f64> {
        let speeds = self
            .samples
            .iter()
            .map(|(bytes, seconds)| *bytes as f64 / seconds / 1e9);
        median(speeds.collect())
    }
}

/// The middle value, or the mean of the two.
pub fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let (middle, odd) = (values.len() / 2, !values.len().is_multiple_of(2));
    match (values.get(middle.wrapping_sub(1)), values.get(middle)) {
        (_, Some(&value)) if odd => Some(value),
        (Some(&a), Some(&b)) => Some(f64::midpoint(a, b)),
        _ => None,
    }
}

/// Where the bytes were before a load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// On the disk only.
    Cold,
    /// In the page cache.
    Warm,
}

impl State {
    /// `cold`, `warm`.
    pub fn name(self) -> &'static str {
        match self {
            State::Cold => "cold",
            State::Warm => "warm",
        }
    }
}

/// Who loads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Who {
    /// This program.
    Tonnage,
    /// The reference package.
    Reference,
}

impl Who {
    /// `tonnage`, `reference`.
    pub fn name(self) -> &'static str {
        match self {
            Who::Tonnage => "tonnage",
            Who::Reference => "reference",
        }
    }
}

/// One side's loads of one kind.
#[derive(Debug)]
pub struct Loads {
    /// Who.
    pub who: Who,
    /// From where.
    pub state: State,
    /// To which device.
    pub to: String,
    /// Bytes of a load.
    pub bytes: u64,
    /// Seconds of each round.
    pub seconds: Vec<f64>,
    /// The way that was taken, and why.
    pub strategy: Option<(String, String)>,
    /// Why there are no rounds, or no more.
    pub failed: Option<String>,
}

impl Loads {
    /// None yet.
    pub fn new(who: Who, state: State, to: &str, bytes: u64) -> Self {
        Loads {
            who,
            state,
            to: to.to_owned(),
            bytes,
            seconds: Vec::new(),
            strategy: None,
            failed: None,
        }
    }

    /// Seconds of a load: the median.
    pub fn median(&self) -> Option<f64> {
        median(self.seconds.clone())
    }

    /// Gigabytes (10^9) a second.
    pub fn speed(&self) -> Option<f64> {
        self.median()
            .filter(|&seconds| seconds > 0.0)
            .map(|seconds| self.bytes as f64 / seconds / 1e9)
    }
}

/// Everything.
#[derive(Debug)]
pub struct Report {
    /// What was loaded.
    pub path: String,
    /// Its tensors, and how many there are.
    pub tensors: (usize, usize),
    /// Their bytes, and how many there are.
    pub bytes: (u64, u64),
    /// The machine.
    pub machine: Description,
    /// The reference package and its Python, in words.
    pub reference: Option<String>,
    /// What the machine can do.
    pub limits: Vec<Limit>,
    /// What was loaded.
    pub loads: Vec<Loads>,
    /// What was left out, and why.
    pub notes: Vec<String>,
    /// How long all of it took.
    pub seconds: f64,
}

impl Report {
    /// How many times as fast as the reference under the same conditions.
    pub fn against_reference(&self, loads: &Loads) -> Option<f64> {
        let same = |other: &&Loads| {
            other.who == Who::Reference && other.state == loads.state && other.to == loads.to
        };
        let reference = self.loads.iter().find(same)?.median()?;
        loads
            .median()
            .filter(|&own| own > 0.0)
            .map(|own| reference / own)
    }

    /// The part that a load reaches of what bounds it: the disk if it was cold; else the page cache read
    /// into fresh memory, or the copy to the device, whichever is slower.
    pub fn of_limit(&self, loads: &Loads) -> Option<f64> {
        let best = |group: &str, word: &str| {
            let fits = |limit: &&Limit| limit.group == group && limit.name.contains(word);
            let speeds = self.limits.iter().filter(fits).filter_map(Limit::speed);
            speeds.max_by(f64::total_cmp)
        };
        let device = (loads.to != "cpu")
            .then(|| best(&loads.to, "to the device"))
            .flatten();
        let source = match (loads.state, loads.to.as_str()) {
            (State::Cold, _) => best("disk", ""),
            (State::Warm, "cpu") => best("page cache", "fresh"),
            (State::Warm, _) => best("page cache", "reads"),
        };
        let limit = source.into_iter().chain(device).min_by(f64::total_cmp)?;
        Some(loads.speed()? / limit)
    }

    /// As JSON.
    pub fn to_json(&self) -> Value {
        let machine = &self.machine;
        let limits: Vec<Value> = self.limits.iter().map(limit_json).collect();
        let loads: Vec<Value> = self
            .loads
            .iter()
            .map(|loads| self.loads_json(loads))
            .collect();
        json!({
            "schema": "tonnage.bench/1",
            "path": self.path,
            "tensors": self.tensors.0, "tensor_count": self.tensors.1,
            "bytes": self.bytes.0, "total_bytes": self.bytes.1,
            "machine": {
                "processor": machine.processor, "threads": machine.threads, "memory": machine.memory,
                "system": machine.system, "file_system": machine.file_system, "storage": machine.storage,
            },
            "version": env!("CARGO_PKG_VERSION"),
            "reference": self.reference,
            "limits": limits,
            "loads": loads,
            "notes": self.notes,
            "seconds": self.seconds,
        })
    }

    fn loads_json(&self, loads: &Loads) -> Value {
        let (strategy, reason) = loads.strategy.clone().unzip();
        json!({
            "who": loads.who.name(), "from": loads.state.name(), "to": loads.to, "bytes": loads.bytes,
            "seconds": loads.seconds, "median": loads.median(), "gb_per_s": loads.speed(),
            "of_limit": self.of_limit(loads), "strategy": strategy, "reason": reason,
            "failed": loads.failed,
        })
    }

    /// As text.
    ///
    /// # Errors
    /// What writing said.
    pub fn write(&self, out: &mut Out) -> Result<(), Failure> {
        for line in self.heading() {
            writeln!(out, "{}", text::line(&line))?;
        }
        writeln!(out)?;
        let colour = out.colour();
        let mut table = Table::new(&[("this machine", Side::Left), ("GB/s", Side::Right)]);
        for limit in &self.limits {
            table.row(vec![
                text::name(&limit.name).into_owned(),
                speed(limit.speed()),
            ]);
        }
        table.write(out, colour)?;
        writeln!(out)?;
        self.table().write(out, colour)?;
        for note in &self.notes {
            writeln!(out, "note: {}", text::line(note))?;
        }
        Ok(())
    }

    /// What was measured, on what, with what.
    pub fn heading(&self) -> Vec<String> {
        let machine = &self.machine;
        let (some, all) = self.tensors;
        let of = if some < all {
            format!(" of {}", text::grouped(all as u64))
        } else {
            String::new()
        };
        let mut lines = vec![
            format!(
                "{} · {}{of} tensors, {}",
                text::name(&self.path),
                text::grouped(some as u64),
                text::size(self.bytes.0)
            ),
            format!(
                "  machine    {}, {}, {}, {}",
                machine.processor,
                text::plural(machine.threads as u64, "thread"),
                text::size(machine.memory),
                machine.system
            ),
            format!("  storage    {} ({})", machine.file_system, machine.storage),
            format!("  with       tonnage {}", env!("CARGO_PKG_VERSION")),
        ];
        if let Some(reference) = &self.reference {
            lines.push(format!("  reference  {reference}"));
        }
        lines
    }

    fn table(&self) -> Table {
        let mut table = Table::new(&[
            ("load", Side::Left),
            ("who", Side::Left),
            ("time", Side::Right),
            ("GB/s", Side::Right),
            ("of the limit", Side::Right),
            ("reference", Side::Right),
            ("way", Side::Left),
        ]);
        for loads in &self.loads {
            let way = match (&loads.failed, &loads.strategy) {
                (Some(why), _) => format!("failed: {why}"),
                (None, Some((strategy, reason))) if !reason.is_empty() => {
                    format!("{strategy}: {reason}")
                }
                (None, Some((strategy, _))) => strategy.clone(),
                (None, None) => String::new(),
            };
            let ratio = self
                .against_reference(loads)
                .filter(|_| loads.who == Who::Tonnage);
            table.row(vec![
                format!("{} to {}", loads.state.name(), loads.to),
                loads.who.name().to_owned(),
                loads.median().map_or_else(|| "-".to_owned(), duration),
                speed(loads.speed()),
                self.of_limit(loads)
                    .map_or_else(|| "-".to_owned(), |part| format!("{:.0} %", part * 100.0)),
                ratio.map_or_else(String::new, |ratio| format!("{ratio:.2} ×")),
                text::line(&way).into_owned(),
            ]);
        }
        table
    }
}

fn limit_json(limit: &Limit) -> Value {
    json!({"group": limit.group, "name": limit.name, "gb_per_s": limit.speed()})
}

/// A speed in GB/s.
pub fn speed(value: Option<f64>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| format!("{value:.2}"))
}

/// Seconds, or milliseconds below one.
pub fn duration(seconds: f64) -> String {
    if seconds < 1.0 {
        format!("{:.1} ms", seconds * 1000.0)
    } else {
        format!("{seconds:.2} s")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median(vec![]), None);
        assert_eq!(median(vec![3.0]), Some(3.0));
        assert_eq!(median(vec![3.0, 1.0]), Some(2.0));
        assert_eq!(median(vec![9.0, 1.0, 2.0]), Some(2.0));
    }

    #[test]
    fn a_round_of_nothing_does_not_count() {
        let mut limit = Limit::new("disk", "x".to_owned());
        limit.add(0, 1.0);
        limit.add(1, 0.0);
        assert_eq!(limit.speed(), None);
        limit.add(2_000_000_000, 1.0);
        assert_eq!(limit.speed(), Some(2.0));
    }
}
