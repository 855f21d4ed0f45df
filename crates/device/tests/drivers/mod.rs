//! The Vulkan drivers that `scripts/vulkan-drivers.sh` unpacks, for tests.
//!
//! The loader reads its variables once a process, and a process can't set its own safely: a test runs itself
//! once more, alone, with the driver that it wants.

#![allow(dead_code, reason = "each test program uses a part of it")]

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Tells the second run from the first.
const INSIDE: &str = "TONNAGE_TEST_INSIDE";

/// Where the drivers are, if this machine is to have them.
fn home() -> Option<PathBuf> {
    if !cfg!(target_os = "linux") {
        return None;
    }
    if env::var("TONNAGE_TEST_VULKAN").is_ok_and(|value| value == "none") {
        assert!(env::var_os("CI").is_none(), "CI has the drivers");
        return None;
    }
    // The folder for the files of tests is in the folder of everything built.
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent();
    let home = target.expect("a parent").join("vulkan");
    assert!(
        home.join("stamp").is_file(),
        "no drivers in {}: run scripts/vulkan-drivers.sh; TONNAGE_TEST_VULKAN=none leaves these tests out",
        home.display()
    );
    Some(home)
}

/// A process that has this driver and no other.
pub fn with_driver(command: &mut Command, home: &Path, driver: &str) {
    command
        .env("LD_LIBRARY_PATH", home.join("lib"))
        .env("VK_DRIVER_FILES", home.join(format!("{driver}.json")))
        .env("VK_LAYER_PATH", home.join("layers"))
        // A heap for each thread takes 64 MiB of addresses and more, which tests with a limit of addresses count.
        .env("MALLOC_ARENA_MAX", "1")
        // Mesa's own layer asks a display for its favourite card.
        .env("NODEVICE_SELECT", "1");
}

/// What the second run printed.
fn run_again(test: &str, driver: &str, prepare: impl FnOnce(&mut Command)) -> Option<String> {
    let home = home()?;
    let mut command = Command::new(env::current_exe().expect("this program"));
    command.args([test, "--exact", "--nocapture", "--include-ignored"]);
    with_driver(&mut command, &home, driver);
    command.env(INSIDE, "1");
    prepare(&mut command);
    let output = command.output().expect("this program runs");
    let text = [&output.stdout[..], &output.stderr[..]].concat();
    let text = String::from_utf8_lossy(&text);
    assert!(output.status.success(), "{test} on {driver}:\n{text}");
    assert!(text.contains("1 passed"), "{test} is a test:\n{text}");
    Some(text.into_owned())
}

/// Runs `body`, which is all of the test of this name, on a driver.
pub fn on(driver: &str, test: &str, body: fn()) {
    match env::var_os(INSIDE) {
        Some(_) => body(),
        None => drop(run_again(test, driver, |_| ())),
    }
}

/// As [`on`], with the validation layer looking on, hazards between copies included. Gives its complaints, to
/// the first run only.
pub fn validated(driver: &str, test: &str, body: fn()) -> Option<Vec<String>> {
    if env::var_os(INSIDE).is_some() {
        body();
        return None;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let settings = folder.path().join("vk_layer_settings.txt");
    // To its standard output: a file is begun anew with each instance.
    let text = "khronos_validation.debug_action = VK_DBG_LAYER_ACTION_LOG_MSG\n\
                khronos_validation.log_filename = stdout\n\
                khronos_validation.report_flags = error,warn,perf,info\n\
                khronos_validation.enable_message_limit = false\n\
                khronos_validation.validate_sync = true\n";
    fs::write(&settings, text).expect("settings");
    let printed = run_again(test, driver, |command| {
        command
            .env("VK_INSTANCE_LAYERS", "VK_LAYER_KHRONOS_validation")
            .env("VK_LAYER_SETTINGS_PATH", &settings);
    })?;
    let (told, complaints): (Vec<&str>, Vec<&str>) = printed
        .split("Validation ")
        .skip(1)
        .partition(|message| message.starts_with("Information") || !message.contains("MessageID"));
    assert!(
        told.iter()
            .any(|message| message.contains("Synchronization")),
        "the layer does not say that it looks for hazards:\n{printed}"
    );
    Some(complaints.into_iter().map(str::to_owned).collect())
}
