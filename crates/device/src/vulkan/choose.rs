//! What to use of what a driver offers: memory types, queue families, limits. Numbers in, numbers out.

use ash::vk::{MemoryPropertyFlags as Is, PhysicalDeviceType, QueueFlags};

use crate::{DeviceId, Info, Kind};

/// What a driver says of a device.
#[derive(Clone)]
pub(super) struct Facts {
    pub name: String,
    pub kind: PhysicalDeviceType,
    /// By type: what the memory is, and the heap it comes from.
    pub types: Vec<(Is, usize)>,
    /// Bytes of each heap.
    pub heaps: Vec<u64>,
    /// By family: what its queues do, and how many there are.
    pub families: Vec<(QueueFlags, u32)>,
    /// Bytes of one allocation, and of one buffer, at most.
    pub max_allocation: u64,
    pub max_buffer: u64,
    /// Where a storage buffer's binding may begin.
    pub storage_align: u64,
    /// What flushes of memory that is not coherent are multiples of.
    pub atom: u64,
    /// Alignment of host memory that the driver takes in, if it does.
    pub import_align: Option<u64>,
    /// Whether it tells what is free.
    pub budget: bool,
    /// Whether its semaphores count.
    pub timelines: bool,
}

/// Types that are not for everybody: protected content, memory of render passes, and AMD's kinds for
/// debugging, which need features that are not enabled.
const SPECIAL: Is = Is::from_raw(
    Is::PROTECTED.as_raw()
        | Is::LAZILY_ALLOCATED.as_raw()
        | Is::DEVICE_COHERENT_AMD.as_raw()
        | Is::DEVICE_UNCACHED_AMD.as_raw(),
);

/// What a driver may put around a buffer's bytes: SwiftShader's largest buffer needs more than its largest
/// allocation.
const AROUND: u64 = 64 << 10;

impl Facts {
    /// The types among `bits`, as a buffer's requirements say them, that have all of `needed`.
    fn types(&self, bits: u32, needed: Is) -> impl Iterator<Item = (u32, Is, u64)> + '_ {
        let all = (0..32).zip(&self.types);
        all.filter(move |&(at, &(is, _))| {
            bits & (1 << at) != 0 && is.contains(needed) && !is.intersects(SPECIAL)
        })
        .filter_map(|(at, &(is, heap))| Some((at, is, *self.heaps.get(heap)?)))
    }

    /// Whether host and device share their memory: the device's largest heap can be seen by the host.
    ///
    /// A card whose memory the host can see through its bus (resizable BAR) does not count. Writing to it
    /// is no faster than a copy by the card itself, and reading from it is a hundred times slower.
    pub fn unified(&self) -> bool {
        let largest = |needed| {
            self.types(u32::MAX, needed)
                .map(|(_, _, heap)| heap)
                .max()
                .unwrap_or(0)
        };
        let seen = largest(Is::DEVICE_LOCAL | Is::HOST_VISIBLE);
        self.kind != PhysicalDeviceType::DISCRETE_GPU
            && seen > 0
            && seen >= largest(Is::DEVICE_LOCAL)
    }

    /// The type for tensors. The host sees it if it is `shared`; otherwise it is the device's alone, where
    /// the driver has such a type.
    pub fn device_type(&self, bits: u32, shared: bool) -> Option<u32> {
        if shared {
            let needed = Is::DEVICE_LOCAL | Is::HOST_VISIBLE;
            let best = self.types(bits, needed).max_by_key(|&(at, is, heap)| {
                // Reads of memory that is not cached are slow, and a flush is one more call.
                let kept = [Is::HOST_CACHED, Is::HOST_COHERENT].map(|flag| is.contains(flag));
                (heap, kept, u32::MAX - at)
            });
            return best.map(|(at, ..)| at);
        }
        let best = |needed| {
            self.types(bits, needed)
                .max_by_key(|&(at, is, heap)| (heap, !is.contains(Is::HOST_VISIBLE), u32::MAX - at))
        };
        best(Is::DEVICE_LOCAL)
            .or_else(|| best(Is::empty()))
            .map(|(at, ..)| at)
    }

    /// The type for staging buffers. Each driver has one that is visible and coherent.
    pub fn staging_type(&self, bits: u32) -> Option<u32> {
        let needed = Is::HOST_VISIBLE | Is::HOST_COHERENT;
        let best = self.types(bits, needed).max_by_key(|&(at, is, heap)| {
            // Downloads are read by the host, so cached comes first; then what costs the device nothing.
            let kept = [is.contains(Is::HOST_CACHED), !is.contains(Is::DEVICE_LOCAL)];
            (kept, heap, u32::MAX - at)
        });
        best.map(|(at, ..)| at)
    }

    /// Bytes of the heap that a type comes from.
    pub fn heap(&self, memory_type: u32) -> Option<(usize, u64)> {
        let &(_, heap) = self.types.get(memory_type as usize)?;
        Some((heap, *self.heaps.get(heap)?))
    }

    /// What a type is.
    pub fn is(&self, memory_type: u32) -> Is {
        let found = self.types.get(memory_type as usize);
        found.map_or(Is::empty(), |&(is, _)| is)
    }

    /// The family for copies: one that does nothing else, since that is the copy engine, then one that
    /// computes, then any that copies.
    pub fn copy_family(&self) -> Option<u32> {
        let rank = |does: QueueFlags| {
            let work = does & !(QueueFlags::SPARSE_BINDING | QueueFlags::PROTECTED);
            let copies = does.intersects(
                // The last two copy, whether they say so or not.
                QueueFlags::TRANSFER | QueueFlags::COMPUTE | QueueFlags::GRAPHICS,
            );
            match work {
                _ if !copies => None,
                QueueFlags::TRANSFER => Some(0),
                work if work.contains(QueueFlags::GRAPHICS) => Some(2),
                work if work.contains(QueueFlags::COMPUTE) => Some(1),
                // Video engines.
                _ => Some(3),
            }
        };
        let all = (0..).zip(&self.families);
        all.filter(|(_, (_, count))| *count > 0)
            .filter_map(|(at, &(does, _))| Some((rank(does)?, at)))
            .min()
            .map(|(_, at)| at)
    }

    /// The families that a device is opened with: the one for copies, then one that computes, for those who
    /// use the memory.
    pub fn open_families(&self) -> Vec<u32> {
        let computes = (0..)
            .zip(&self.families)
            .find(|(_, (does, count))| *count > 0 && does.contains(QueueFlags::COMPUTE));
        let mut families: Vec<u32> = self.copy_family().into_iter().collect();
        families.extend(computes.map(|(at, _)| at));
        families.dedup();
        families
    }

    /// What the device is, for those who choose one; or what it lacks.
    pub fn info(&self, index: u32, force_staging: bool) -> Result<Info, &'static str> {
        if !self.timelines {
            return Err("it has no timeline semaphores");
        }
        self.copy_family().ok_or("it has no queue that copies")?;
        self.staging_type(u32::MAX)
            .ok_or("it has no memory that the host sees")?;
        let unified = self.unified() && !force_staging;
        let (_, heap) = self
            .device_type(u32::MAX, unified)
            .and_then(|chosen| self.heap(chosen))
            .ok_or("it has no memory of its own")?;
        let align = self.storage_align.checked_next_power_of_two();
        let allocation = self.max_allocation.min(heap);
        let region = allocation.checked_sub(AROUND).unwrap_or(allocation);
        Ok(Info {
            id: DeviceId::new(Kind::Vulkan, index),
            name: self.name.clone(),
            total_memory: heap,
            unified,
            // 256 is the most that any driver asks for.
            align: align.unwrap_or(256).clamp(256, 1 << 16),
            max_region: region.min(self.max_buffer).max(1),
            pitched: true,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn facts(kind: PhysicalDeviceType, types: &[(Is, usize)], heaps: &[u64]) -> Facts {
        Facts {
            name: "a device".to_owned(),
            kind,
            types: types.to_vec(),
            heaps: heaps.to_vec(),
            families: vec![(QueueFlags::GRAPHICS | QueueFlags::COMPUTE, 1)],
            max_allocation: 2 * GIB,
            max_buffer: 4 * GIB,
            storage_align: 16,
            atom: 64,
            import_align: None,
            budget: false,
            timelines: true,
        }
    }

    fn card() -> Facts {
        let seen = Is::HOST_VISIBLE | Is::HOST_COHERENT;
        facts(
            PhysicalDeviceType::DISCRETE_GPU,
            &[
                (Is::empty(), 1),
                (Is::DEVICE_LOCAL, 0),
                (seen, 1),
                (seen | Is::HOST_CACHED, 1),
                (seen | Is::DEVICE_LOCAL, 2),
                (Is::DEVICE_LOCAL | Is::PROTECTED, 0),
            ],
            &[24 * GIB, 48 * GIB, GIB / 4],
        )
    }

    #[test]
    fn a_card_is_reached_through_cached_host_memory() {
        let card = card();
        assert!(!card.unified());
        assert_eq!(card.device_type(u32::MAX, false), Some(1));
        assert_eq!(card.staging_type(u32::MAX), Some(3));
        assert_eq!(card.staging_type(0b100), Some(2), "the only one allowed");
        assert_eq!(card.device_type(0b10_0000, false), None, "protected");
        let info = card.info(3, false).unwrap();
        assert_eq!(
            (info.total_memory, info.max_region),
            (24 * GIB, 2 * GIB - AROUND)
        );
        assert_eq!((info.align, info.unified), (256, false));
        assert_eq!(info.id.to_string(), "vulkan:3");
    }

    #[test]
    fn a_card_with_a_large_window_is_still_a_card() {
        let mut card = card();
        card.types[4].1 = 0;
        assert!(!card.unified());
        assert_eq!(card.device_type(u32::MAX, false), Some(1));
        card.kind = PhysicalDeviceType::INTEGRATED_GPU;
        assert!(card.unified());
        assert_eq!(card.device_type(u32::MAX, true), Some(4));
        assert!(card.info(0, false).unwrap().unified);
        assert!(!card.info(0, true).unwrap().unified);
    }

    #[test]
    fn shared_memory_is_cached_and_coherent_where_there_is_a_choice() {
        let local = Is::DEVICE_LOCAL | Is::HOST_VISIBLE;
        let types = [
            (Is::DEVICE_LOCAL, 0),
            (local | Is::HOST_COHERENT, 0),
            (local | Is::HOST_CACHED, 0),
            (local | Is::HOST_COHERENT | Is::HOST_CACHED, 0),
        ];
        let phone = facts(PhysicalDeviceType::INTEGRATED_GPU, &types, &[GIB]);
        assert_eq!(phone.device_type(u32::MAX, true), Some(3));
        assert_eq!(phone.device_type(0b0111, true), Some(2));
        assert_eq!(phone.device_type(u32::MAX, false), Some(0));
        assert_eq!(
            phone.info(0, false).unwrap().max_region,
            GIB - AROUND,
            "the heap"
        );
    }

    #[test]
    fn copies_have_the_copy_engine() {
        let all = QueueFlags::GRAPHICS | QueueFlags::COMPUTE | QueueFlags::TRANSFER;
        let mut card = card();
        for (families, copy, open) in [
            (vec![(all, 16)], Some(0), vec![0]),
            (
                vec![
                    (all, 16),
                    (QueueFlags::TRANSFER | QueueFlags::VIDEO_DECODE_KHR, 1),
                    (QueueFlags::TRANSFER | QueueFlags::SPARSE_BINDING, 2),
                    (QueueFlags::COMPUTE, 8),
                ],
                Some(2),
                vec![2, 0],
            ),
            (
                vec![(all, 1), (QueueFlags::COMPUTE, 8)],
                Some(1),
                vec![1, 0],
            ),
            (vec![(QueueFlags::TRANSFER, 0), (all, 1)], Some(1), vec![1]),
            (vec![(QueueFlags::SPARSE_BINDING, 1)], None, vec![]),
            (vec![], None, vec![]),
        ] {
            card.families = families;
            assert_eq!((card.copy_family(), card.open_families()), (copy, open));
            assert_eq!(card.info(0, false).is_ok(), copy.is_some());
        }
    }

    #[test]
    fn nonsense_is_no_device() {
        let seen = Is::HOST_VISIBLE | Is::HOST_COHERENT;
        for (types, heaps) in [
            (vec![], vec![]),
            (vec![(seen, 9)], vec![GIB]),
            (vec![(Is::DEVICE_LOCAL, 0)], vec![GIB]),
        ] {
            let facts = facts(PhysicalDeviceType::OTHER, &types, &heaps);
            assert!(facts.info(0, false).is_err(), "{} types", types.len());
        }
        let mut odd = facts(PhysicalDeviceType::OTHER, &[(seen, 0)], &[GIB]);
        (odd.storage_align, odd.max_allocation) = (u64::MAX, 0);
        let info = odd.info(0, false).unwrap();
        assert_eq!((info.align, info.max_region), (256, 1));
    }
}
