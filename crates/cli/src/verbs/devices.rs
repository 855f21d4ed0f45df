//! `devices`: what was found, and what to do where nothing was.

mod gds;
mod signs;

use std::io::Write;
use std::path::PathBuf;

use serde_json::{Value, json};
use tonnage::device::find::{self, Found, Settings};
use tonnage::device::{Cause, DeviceId, Info, Kind};

use self::signs::Signs;
use crate::args::{self, Common};
use crate::exit::{FOUND, Failure, OK};
use crate::table::{Side, Table};
use crate::terminal::Out;
use crate::{json, text};

/// Where drivers are, as the environment says: an edge may read it, and what is below may not.
pub fn settings() -> Settings {
    let told = |name| std::env::var_os(name).filter(|value| !value.is_empty());
    Settings {
        cuda_driver: told("TONNAGE_CUDA_DRIVER").map(PathBuf::from),
        hip_driver: told("TONNAGE_HIP_DRIVER").map(PathBuf::from),
        vulkan_loader: told("TONNAGE_VULKAN_LOADER").map(PathBuf::from),
        vulkan_force_staging: told("TONNAGE_VULKAN_FORCE_STAGING").is_some(),
    }
}

/// One kind, as it is shown.
struct Kinds {
    found: Found,
    /// What this machine shows about it, and what follows; where there is no device.
    hints: Vec<String>,
}

/// One device, as it is shown.
struct Shown {
    info: Info,
    total: Option<u64>,
    free: Result<Option<u64>, String>,
}

/// Runs the verb.
pub fn run(args: &args::Devices, common: &Common, out: &mut Out) -> Result<u8, Failure> {
    if args.try_cufile {
        return gds::attempt();
    }
    let wanted: Option<DeviceId> = match &args.device {
        Some(name) => Some(
            name.parse()
                .map_err(|error| Failure::Usage(format!("{error}")))?,
        ),
        None => None,
    };
    let settings = settings();
    let signs = Signs::of_this_machine();
    let mut kinds: Vec<Kinds> = find::devices(&settings)
        .into_iter()
        .filter(|found| wanted.is_none_or(|id| id.kind == found.kind))
        .map(|found| {
            let hints = if found.devices.is_ok() {
                Vec::new()
            } else {
                signs.hints(found.kind)
            };
            Kinds { found, hints }
        })
        .collect();
    let there = |id: DeviceId| {
        kinds
            .iter()
            .any(|kind| infos(kind).any(|info| info.id == id))
    };
    let absent = wanted.is_some_and(|id| !there(id));
    if let Some(id) = wanted.filter(|_| !absent) {
        for kind in &mut kinds {
            if let Ok(devices) = &mut kind.found.devices {
                devices.retain(|info| info.id == id);
            }
        }
    }
    let shown: Vec<Shown> = kinds
        .iter()
        .flat_map(infos)
        .map(|info| look(info, &settings))
        .collect();
    let cards = shown.iter().any(|device| device.info.id.kind == Kind::Cuda);
    let storage = cards.then(gds::look);
    if common.json {
        let mut report = report(&kinds, &shown);
        report["gpudirect_storage"] = storage.as_ref().map_or(Value::Null, gds::Seen::json);
        json::write(out, &report)?;
    } else {
        show(&kinds, &shown, out)?;
        if let Some(storage) = &storage {
            writeln!(
                out,
                "\nGPUDirect Storage: {}",
                text::line(&storage.to_string())
            )?;
        }
    }
    Ok(if absent { FOUND } else { OK })
}

fn infos(kind: &Kinds) -> impl Iterator<Item = &Info> {
    kind.found.devices.iter().flatten()
}

/// Opens the device for a moment, since only then a driver tells what is free.
fn look(info: &Info, settings: &Settings) -> Shown {
    let (total, free) = if info.id == DeviceId::HOST {
        let (total, free) = signs::host_memory();
        (total, Ok(free))
    } else {
        let free = find::open(info.id, settings).and_then(|device| device.free_memory());
        let total = Some(info.total_memory).filter(|&bytes| bytes < u64::MAX);
        (total, free.map(Some).map_err(|error| error.to_string()))
    };
    Shown {
        info: info.clone(),
        total,
        free,
    }
}

/// What follows from what it can do.
fn abilities(info: &Info) -> Vec<&'static str> {
    let way = match info.id.kind {
        Kind::Host => "files are read or mapped into it",
        _ if info.unified => "files are read straight into its memory",
        _ => "through staging buffers, reading and copying at the same time",
    };
    let mut can = vec![way];
    if info.pitched && info.id.kind != Kind::Host {
        can.push("column slices by its copy engine");
    }
    can
}

fn show(kinds: &[Kinds], shown: &[Shown], out: &mut Out) -> Result<(), Failure> {
    let size = |bytes: Option<u64>| bytes.map_or_else(|| "-".to_owned(), text::size);
    let mut table = Table::new(&[
        ("device", Side::Left),
        ("name", Side::Left),
        ("memory", Side::Right),
        ("free", Side::Right),
        ("unified", Side::Left),
        ("one allocation", Side::Right),
        ("loading", Side::Left),
    ]);
    for device in shown {
        let info = &device.info;
        let largest = Some(info.max_region).filter(|&bytes| bytes < isize::MAX as u64);
        table.row(vec![
            info.id.to_string(),
            text::name(&info.name).into_owned(),
            size(device.total),
            size(device.free.clone().unwrap_or(None)),
            if info.unified { "yes" } else { "no" }.to_owned(),
            largest.map_or_else(|| "any".to_owned(), text::size),
            abilities(info).join("; "),
        ]);
    }
    let colour = out.colour();
    table.write(out, colour)?;
    for device in shown {
        if let Err(why) = &device.free {
            writeln!(out, "{}: {}", device.info.id, text::line(why))?;
        }
    }
    for kind in kinds {
        let Err(error) = &kind.found.devices else {
            continue;
        };
        writeln!(
            out,
            "\nno {} device: {}",
            kind.found.kind.name(),
            text::line(&why(error.cause()))
        )?;
        for hint in &kind.hints {
            writeln!(out, "  · {}", text::line(hint))?;
        }
    }
    Ok(())
}

fn why(cause: &Cause) -> String {
    cause.to_string()
}

fn report(kinds: &[Kinds], shown: &[Shown]) -> Value {
    let devices: Vec<Value> = shown
        .iter()
        .map(|device| {
            let info = &device.info;
            json!({
                "id": info.id.to_string(), "kind": info.id.kind.name(), "index": info.id.index,
                "name": info.name, "memory": device.total,
                "free": device.free.as_ref().ok().copied().flatten(),
                "error": device.free.as_ref().err(), "unified": info.unified, "align": info.align,
                "max_region": info.max_region, "pitched": info.pitched, "abilities": abilities(info),
            })
        })
        .collect();
    let kinds: Vec<Value> = kinds
        .iter()
        .map(|kind| {
            let reason = kind
                .found
                .devices
                .as_ref()
                .err()
                .map(|error| why(error.cause()));
            json!({
                "kind": kind.found.kind.name(), "driver": kind.found.driver,
                "devices": infos(kind).count(), "reason": reason, "hints": kind.hints,
            })
        })
        .collect();
    json!({"schema": "tonnage.devices/1", "devices": devices, "kinds": kinds})
}
