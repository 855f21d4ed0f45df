//! Vulkan devices keep the contract of devices, on drivers that run on the processor.

mod contract;
mod drivers;

use std::sync::Arc;

use tonnage_device::vulkan::{self, Settings, VulkanDevice};
use tonnage_device::{Device, Kind};

fn open(force_staging: bool) -> Arc<VulkanDevice> {
    let settings = Settings {
        force_staging,
        ..Settings::default()
    };
    vulkan::open(0, &settings).unwrap()
}

#[test]
fn lavapipe_shares_memory_and_keeps_the_contract() {
    drivers::on(
        "lavapipe",
        "lavapipe_shares_memory_and_keeps_the_contract",
        || {
            let device = open(false);
            assert!(device.info().unified);
            assert!(device.allocate(10).unwrap().with_host(2..7, &mut |_| ()));
            contract::keeps_the_contract(&*device);
        },
    );
}

#[test]
fn lavapipe_through_staging_buffers_keeps_the_contract() {
    drivers::on(
        "lavapipe",
        "lavapipe_through_staging_buffers_keeps_the_contract",
        || {
            let device = open(true);
            assert!(!device.info().unified);
            assert!(!device.allocate(10).unwrap().with_host(2..7, &mut |_| ()));
            contract::keeps_the_contract(&*device);
        },
    );
}

#[test]
fn swiftshader_keeps_the_contract() {
    drivers::on("swiftshader", "swiftshader_keeps_the_contract", || {
        for force_staging in [false, true] {
            let device = open(force_staging);
            assert!(device.info().name.contains("SwiftShader"));
            assert_eq!(device.info().id.kind, Kind::Vulkan);
            contract::keeps_the_contract(&*device);
        }
    });
}

#[test]
fn validation_finds_nothing() {
    let said = drivers::validated("lavapipe", "validation_finds_nothing", || {
        for force_staging in [false, true] {
            contract::keeps_the_contract(&*open(force_staging));
        }
    });
    assert_eq!(said.trim(), "");
}
