//! Vulkan devices keep the contract of devices, on drivers that run on the processor.

mod consumer;
mod contract;
mod drivers;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use tonnage_device::vulkan::{self, Settings, VulkanDevice};
use tonnage_device::{
    Cause, Device, Error, HostDevice, Kind, Memory, Pool, Stream, Transfer, find,
};

const MIB: u64 = 1 << 20;

/// The ways to open a device: as it is, as a card, and as a card whose driver takes in no pages.
fn ways() -> [Settings; 3] {
    let settings = |force_staging, driver_pages| Settings {
        library: None,
        force_staging,
        driver_pages,
    };
    [
        settings(false, false),
        settings(true, false),
        settings(true, true),
    ]
}

fn open(way: usize) -> Arc<VulkanDevice> {
    vulkan::open(0, &ways()[way]).unwrap()
}

#[test]
fn lavapipe_keeps_the_contract() {
    drivers::on("lavapipe", "lavapipe_keeps_the_contract", || {
        for (way, unified) in [(0, true), (1, false), (2, false)] {
            let device = open(way);
            assert_eq!(device.info().unified, unified);
            let memory = device.allocate(10).unwrap();
            assert_eq!(memory.with_host(2..7, &mut |_| ()), unified);
            contract::keeps_the_contract(&*device);
        }
    });
}

#[test]
fn swiftshader_keeps_the_contract() {
    drivers::on("swiftshader", "swiftshader_keeps_the_contract", || {
        for way in 0..ways().len() {
            let device = open(way);
            assert!(device.info().name.contains("SwiftShader"));
            assert_eq!(device.info().id.kind, Kind::Vulkan);
            contract::keeps_the_contract(&*device);
        }
    });
}

/// For machines with a card: `cargo test -p tonnage-device --test vulkan -- --ignored`.
#[test]
#[ignore = "runs on the drivers that the machine has"]
fn what_the_machine_has_keeps_the_contract() {
    for settings in ways() {
        for info in vulkan::devices(&settings).unwrap() {
            println!("{info:?}");
            let device = vulkan::open(info.id.index, &settings).unwrap();
            contract::keeps_the_contract(&*device);
        }
    }
}

/// Prints what copies from staging buffers reach: 4 GiB through four slots of 8 MiB, both ways.
#[test]
#[ignore = "measures the drivers that the machine has"]
fn what_copies_reach() {
    let (slots, len, rounds) = (4, 8 << 20, 512);
    for settings in &ways()[1..] {
        let device = vulkan::open(0, settings).unwrap();
        let pool = Pool::new((slots * len) as u64);
        let memory = device.allocate(1 << 30).unwrap();
        let mut queue = device.queue().unwrap();
        let lend = || pool.lend(&*device, len, 1, 1, &|| false).unwrap().remove(0);
        for up in [true, false] {
            let (start, mut tickets) = (Instant::now(), VecDeque::new());
            for round in 0..rounds {
                if tickets.len() == slots {
                    drop(tickets.pop_front());
                }
                let at = (round * len) as u64 % memory.len();
                let transfers = vec![Transfer::plain(memory.clone(), at, 0, len)];
                tickets.push_back(match up {
                    true => queue.upload(lend(), transfers).unwrap(),
                    false => queue.download(lend(), transfers).unwrap(),
                });
            }
            queue.drain().unwrap();
            let rate = (rounds * len) as f64 / start.elapsed().as_secs_f64() / 1e9;
            println!(
                "{} up: {up}, {settings:?}: {rate:.1} GB/s",
                device.info().name
            );
        }
    }
}

#[test]
fn validation_finds_nothing() {
    let said = drivers::validated("lavapipe", "validation_finds_nothing", || {
        for way in 0..ways().len() {
            contract::keeps_the_contract(&*open(way));
            copies_of_one_ticket_overlap(&*open(way));
            everything_goes_in_any_order(way);
            threads_have_their_queues(&open(way));
        }
    });
    assert_eq!(said.unwrap_or_default(), [""; 0]);
}

#[test]
fn who_computes_finds_the_buffer_and_validation_looks_on() {
    let name = "who_computes_finds_the_buffer_and_validation_looks_on";
    let said = drivers::validated("lavapipe", name, || {
        let device = open(1);
        let memory = device.allocate(1000).unwrap();
        let consumer = consumer::Consumer::of(&memory);
        consumer.fill(0x0101_0101 * 7, true);
        let mut queue = device.queue().unwrap();
        let bytes = contract::download(&*device, queue.as_mut(), &memory);
        assert!(bytes.iter().all(|&byte| byte == 7));
    });
    assert_eq!(said.unwrap_or_default(), [""; 0]);
}

#[test]
fn validation_sees_a_missing_barrier() {
    let said = drivers::validated("lavapipe", "validation_sees_a_missing_barrier", || {
        let memory = open(1).allocate(1000).unwrap();
        consumer::Consumer::of(&memory).fill(7, false);
    });
    if let Some(said) = said {
        assert!(
            said.len() == 1 && said[0].contains("WRITE-AFTER-WRITE"),
            "{said:?}"
        );
    }
}

/// The later of two transfers to the same bytes stays, in both directions.
fn copies_of_one_ticket_overlap(device: &dyn Device) {
    let (pool, mut queue) = (Pool::new(MIB), device.queue().unwrap());
    let memory = device.allocate(1000).unwrap();
    contract::upload(device, queue.as_mut(), &memory, &[0; 1000]);
    let mut slot = contract::lend(&pool, device, 1).remove(0);
    let bytes = contract::pattern(slot.bytes().len(), 5);
    slot.bytes_mut().copy_from_slice(&bytes);
    let to = |offset, at, len| Transfer::plain(memory.clone(), offset, at, len);
    let transfers = vec![
        to(100, 0, 200),
        to(50, 1000, 100),
        to(0, 2000, 60),
        to(299, 3000, 10),
    ];
    drop(queue.upload(slot, transfers).unwrap());
    let mut wanted = vec![0; 1000];
    for (offset, at, len) in [
        (100, 0, 200),
        (50, 1000, 100),
        (0, 2000, 60),
        (299, 3000, 10),
    ] {
        wanted[offset..offset + len].copy_from_slice(&bytes[at..at + len]);
    }
    assert!(contract::download(device, queue.as_mut(), &memory) == wanted);

    let slot = contract::lend(&pool, device, 1).remove(0);
    let from = vec![to(0, 10, 500), to(500, 0, 300), to(100, 250, 100)];
    let slot = queue.download(slot, from).unwrap().wait().unwrap();
    let mut here = vec![0; 510];
    here[10..510].copy_from_slice(&wanted[..500]);
    here[..300].copy_from_slice(&wanted[500..800]);
    here[250..350].copy_from_slice(&wanted[100..200]);
    assert!(slot.bytes()[..510] == here);
}

/// Tickets, memory, queues and slots may outlive the device that they are of, and each other.
fn everything_goes_in_any_order(way: usize) {
    let (device, pool) = (open(way), Pool::new(MIB));
    let memory = device.allocate(MIB).unwrap();
    let mut queue = device.queue().unwrap();
    let mut tickets = Vec::new();
    for slot in contract::lend(&pool, &*device, 4) {
        let to = Transfer::plain(memory.clone(), 5, 0, slot.bytes().len());
        tickets.push(queue.upload(slot, vec![to]).unwrap());
    }
    let unused = device.queue().unwrap();
    drop(device);
    drop(memory);
    drop(queue);
    drop(tickets);
    drop(unused);
    // Idle slots fit the device when it is opened again.
    let device = open(way);
    let memory = device.allocate(10).unwrap();
    let slot = contract::lend(&pool, &*device, 1).remove(0);
    let to = vec![Transfer::plain(memory, 0, 0, 10)];
    let ticket = device.queue().unwrap().upload(slot, to).unwrap();
    drop(pool);
    drop(device);
    drop(ticket);
}

fn threads_have_their_queues(device: &Arc<VulkanDevice>) {
    let memory = device.allocate(4 * MIB).unwrap();
    std::thread::scope(|scope| {
        for part in 0..4 {
            let (memory, device) = (&memory, &**device);
            scope.spawn(move || {
                let (pool, mut queue) = (Pool::new(MIB), device.queue().unwrap());
                for block in 0..16 {
                    let mut slot = contract::lend(&pool, device, 1).remove(0);
                    let len = slot.bytes().len();
                    slot.bytes_mut().fill(part * 16 + block);
                    let at = u64::from(part * 16 + block) * len as u64;
                    let to = Transfer::plain(memory.clone(), at, 0, len);
                    drop(queue.upload(slot, vec![to]).unwrap());
                }
            });
        }
    });
    let mut queue = device.queue().unwrap();
    let bytes = contract::download(&**device, queue.as_mut(), &memory);
    for (block, bytes) in bytes.chunks(64 << 10).enumerate() {
        assert!(bytes.iter().all(|&byte| byte == block as u8), "{block}");
    }
}

#[test]
fn a_copy_and_the_host_are_never_at_the_same_bytes() {
    let name = "a_copy_and_the_host_are_never_at_the_same_bytes";
    drivers::on("lavapipe", name, || {
        let (device, pool) = (open(0), Pool::new(64 * MIB));
        let mut queue = device.queue().unwrap();
        let len = 32 << 20;
        let memory = device.allocate(len as u64).unwrap();
        for round in 0..10 {
            let mut slot = pool.lend(&*device, len, 1, 1, &|| false).unwrap().remove(0);
            slot.bytes_mut().fill(round);
            let to = Transfer::plain(memory.clone(), 0, 0, len);
            let ticket = queue.upload(slot, vec![to]).unwrap();
            let mut last = None;
            assert!(memory.with_host(len as u64 - 1..len as u64, &mut |byte| last = Some(byte[0])));
            assert_eq!(last, Some(round), "the host waits for the copy");
            drop(ticket);
        }
        // The other way round nobody can wait: the call may be on the same thread.
        let mut refused = None;
        assert!(memory.with_host(10..20, &mut |_| {
            let mut to = |offset, len| {
                let slot = contract::lend(&pool, &*device, 1).remove(0);
                let to = Transfer::plain(memory.clone(), offset, 0, len);
                queue.upload(slot, vec![to])
            };
            assert!(to(0, 10).is_ok() && to(20, 5).is_ok());
            refused = Some(to(19, 2).unwrap_err());
        }));
        assert!(matches!(refused.unwrap().cause(), Cause::Invalid(_)));
        assert!(
            memory.with_host(19..21, &mut |_| ()),
            "nothing is left taken"
        );
    });
}

#[test]
fn what_is_of_another_device_is_refused() {
    drivers::on("lavapipe", "what_is_of_another_device_is_refused", || {
        let (device, host, pool) = (open(1), HostDevice::default(), Pool::new(MIB));
        let mut queue = device.queue().unwrap();
        let (here, there) = (device.allocate(9).unwrap(), host.allocate(9).unwrap());
        for (memory, from) in [(&there, &*device as &dyn Device), (&here, &host)] {
            let slot = contract::lend(&pool, from, 1).remove(0);
            let to = Transfer::plain(memory.clone(), 0, 0, 9);
            let error = queue.upload(slot, vec![to]).unwrap_err();
            assert!(error.to_string().contains("another device"), "{error}");
        }
        // SAFETY: a handle that is only compared.
        #[allow(unsafe_code)]
        let stream = unsafe { Stream::from_raw(7) };
        for error in [queue.after(stream), queue.before(stream)] {
            assert!(matches!(error.unwrap_err().cause(), Cause::Unsupported(_)));
        }
    });
}

#[test]
fn a_region_fits_and_more_is_refused_with_numbers() {
    drivers::on(
        "swiftshader",
        "a_region_fits_and_more_is_refused_with_numbers",
        || {
            let device = open(0);
            let (region, free) = (device.info().max_region, device.free_memory().unwrap());
            assert!(((1 << 30) - MIB..1 << 30).contains(&region), "{region}");
            let whole = device.allocate(region).unwrap();
            assert!(whole.with_host(region - 1..region, &mut |byte| byte[0] = 1));
            let left = device.free_memory().unwrap();
            assert!(left <= free - region);
            // The driver refuses the first, whose memory would be larger than what it takes at once; the second
            // is larger than any buffer.
            for len in [1 << 30, (1 << 30) + 1] {
                let error = device.allocate(len).unwrap_err();
                let text = format!("out of memory: {len} bytes needed, {left} free");
                assert_eq!(
                    error.to_string(),
                    format!("vulkan:0: cannot allocate: {text}")
                );
            }
            drop(whole);
            assert_eq!(device.free_memory().unwrap(), free);
        },
    );
}

/// Fills the device, in blocks of this size.
fn fill(device: &dyn Device, block: u64) -> (Vec<Memory>, Error) {
    let mut all = Vec::new();
    loop {
        match device.allocate(block) {
            Ok(memory) => all.push(memory),
            Err(error) => return (all, error),
        }
    }
}

/// From now on this process may have 512 MiB of addresses more than it has: the driver itself runs out.
#[cfg(target_os = "linux")]
fn leave_little() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let size = status.split("VmSize:").nth(1).unwrap();
    let kib: u64 = size.split_whitespace().next().unwrap().parse().unwrap();
    let limit = Rlimit {
        current: Some(kib * 1024 + 512 * MIB),
        maximum: getrlimit(Resource::As).maximum,
    };
    setrlimit(Resource::As, limit).unwrap();
}

#[cfg(not(target_os = "linux"))]
fn leave_little() {}

fn a_full_device_recovers() {
    for way in [0, 1] {
        let (device, pool) = (open(way), Pool::new(MIB));
        let free = device.free_memory().unwrap();
        let mut queue = device.queue().unwrap();
        // What copies need is made before: this test is of the device's memory.
        let warm = device.allocate(100).unwrap();
        contract::upload(&*device, queue.as_mut(), &warm, &[1; 100]);
        let slot = contract::lend(&pool, &*device, 1);
        drop(slot);
        leave_little();
        let (all, error) = fill(&*device, 64 * MIB);
        assert!(error.is_out_of_memory(), "{error}");
        let Cause::OutOfMemory {
            needed,
            free: Some(_),
        } = *error.cause()
        else {
            panic!("{error}");
        };
        assert_eq!(needed, 64 * MIB);
        let count = all.len();
        assert!((4..=8).contains(&count), "{count} blocks");
        // It goes on with what it has, and all of it comes back.
        contract::upload(&*device, queue.as_mut(), &all[count - 1], &[7; 100]);
        drop((all, warm));
        pool.trim();
        assert_eq!(device.free_memory().unwrap(), free);
        let (all, _) = fill(&*device, 64 * MIB);
        assert!(all.len() + 1 >= count, "{} of {count} blocks", all.len());
    }
}

#[test]
fn a_full_lavapipe_recovers() {
    drivers::on(
        "lavapipe",
        "a_full_lavapipe_recovers",
        a_full_device_recovers,
    );
}

#[test]
fn a_full_swiftshader_recovers() {
    drivers::on(
        "swiftshader",
        "a_full_swiftshader_recovers",
        a_full_device_recovers,
    );
}

#[test]
fn special_memory_and_video_engines_are_left_alone() {
    let name = "special_memory_and_video_engines_are_left_alone";
    drivers::on("mock", name, || {
        let found = vulkan::survey(&Settings::default()).unwrap();
        assert_eq!(found.len(), 1);
        // Types 0 and 1 are the host's, 2 is the device's, 3 is for render passes and 4 for protected content.
        // Family 0 does everything; 1 and 2 copy too, and are video engines.
        assert_eq!(found[0].memory_type, Some(2));
        assert_eq!(found[0].staging_type, Some(2), "cached, and coherent");
        assert_eq!(found[0].copy_family, Some(0));
        // The mock's timelines do not count, and that is said.
        let lack = found[0].device.as_ref().unwrap_err();
        assert!(lack.contains("Mock") && lack.contains("timeline"), "{lack}");
        for error in [
            vulkan::devices(&Settings::default()).unwrap_err(),
            vulkan::open(0, &Settings::default()).unwrap_err(),
        ] {
            assert!(matches!(error.cause(), Cause::Missing(text) if text.contains(lack)));
        }
    });
}

#[test]
fn whoever_looks_finds_it_and_all_share_it() {
    drivers::on(
        "lavapipe",
        "whoever_looks_finds_it_and_all_share_it",
        || {
            let settings = find::Settings::default();
            let found = find::devices(&settings);
            let found = found.iter().find(|found| found.kind == Kind::Vulkan);
            let infos = found.unwrap().devices.as_ref().unwrap();
            assert!(infos.len() == 1 && infos[0].name.contains("llvmpipe") && infos[0].unified);
            let [one, two] = [(); 2].map(|()| find::open(infos[0].id, &settings).unwrap());
            assert!(Arc::ptr_eq(&one, &two) && one.info() == &infos[0]);
            // Opened another way it is another device, and staging buffers are the same.
            let settings = find::Settings {
                vulkan_force_staging: true,
                ..settings
            };
            let card = find::open(infos[0].id, &settings).unwrap();
            assert!(!card.info().unified);
            let slot = contract::lend(&Pool::new(MIB), &*one, 1).remove(0);
            let memory = card.allocate(9).unwrap();
            let to = vec![Transfer::plain(memory, 0, 0, 9)];
            drop(card.queue().unwrap().upload(slot, to).unwrap());
        },
    );
}

#[test]
fn what_is_missing_is_named() {
    let nowhere = Settings {
        library: Some("/nowhere/libvulkan.so.1".into()),
        ..Settings::default()
    };
    let error = vulkan::devices(&nowhere).unwrap_err().to_string();
    assert!(error.contains("/nowhere/libvulkan.so.1"), "{error}");
    assert!(error.contains("libvulkan1"), "what to do: {error}");
    let error = vulkan::open(3, &nowhere).unwrap_err();
    assert_eq!(error.device().to_string(), "vulkan:3");
    drivers::on("nothing", "what_is_missing_is_named", || {
        let error = vulkan::devices(&Settings::default())
            .unwrap_err()
            .to_string();
        assert!(error.contains("mesa-vulkan-drivers"), "{error}");
    });
}

#[test]
fn there_is_one_device() {
    drivers::on("lavapipe", "there_is_one_device", || {
        let error = vulkan::open(1, &Settings::default()).unwrap_err();
        assert!(error.to_string().contains("1 device"), "{error}");
        assert_eq!(error.device().to_string(), "vulkan:1");
    });
}
