//! A rank's piece of a quantised tensor, and its values.

use tonnage_engine::{HostBuffer, Options};
use tonnage_format::Dtype;
use tonnage_plan::Local;
use tonnage_quant::descriptor::Role;
use tonnage_quant::interpret::Bytes;
use tonnage_quant::slice::Cut;

use super::refused;
use crate::cast::cast;
use crate::error::{Error, Result};
use crate::plan::{LocalMemory, PlanLoad, PlannedLoad, Ran};

/// What some ranks have of a quantised tensor.
#[derive(Clone, Debug)]
pub struct QuantShard {
    /// The logical name.
    pub name: String,
    /// The ranks that have it, in order.
    pub ranks: Vec<u32>,
    /// Its first index in the whole tensor.
    pub start: Vec<u64>,
    /// What it is.
    pub cut: Cut,
    /// The names of its parts, as the ranks call them.
    pub parts: Vec<(Role, String)>,
}

impl QuantShard {
    /// Its values, rounded to its dtype, from the bytes of its parts by name.
    ///
    /// # Errors
    /// `PLAN_QUANTIZED` for a part that is not there or is another.
    pub fn values<'a>(&self, bytes: impl Fn(&str) -> Option<&'a [u8]>) -> Result<Vec<f32>> {
        let found = self.parts.iter();
        let found = found.filter_map(|(role, name)| Some((*role, bytes(name)?)));
        let found: Bytes<'a> = found.collect();
        let count = self
            .cut
            .shape
            .iter()
            .try_fold(1_u64, |n, &len| n.checked_mul(len));
        let count = count.and_then(|n| usize::try_from(n).ok());
        let count = count.ok_or_else(|| Error::from(tonnage_format::Reason::SizeOverflow))?;
        let mut values = vec![0.0; count];
        self.cut
            .values(&found, &mut values)
            .map_err(|e| refused(e, &self.name))?;
        Ok(values)
    }
}

impl PlannedLoad<'_> {
    /// A rank's piece of a quantised tensor as numbers of a float dtype, into memory of the caller's. Besides it takes the bytes of
    /// the parts, the values as single-precision numbers, and staging memory.
    ///
    /// # Errors
    /// As [`PlannedLoad::load_into`]; `PLAN_QUANTIZED` for a piece that the rank lacks, or parts that are others.
    pub fn dequantize(
        &self,
        rank: u32,
        shard: &QuantShard,
        to: Dtype,
        out: &mut [u8],
        load: &PlanLoad<'_>,
        options: &Options<'_>,
    ) -> Result<Ran> {
        let locals = self.locals(rank)?;
        let mut memory: Vec<(usize, &str, HostBuffer)> = Vec::new();
        for (_, name) in &shard.parts {
            // A part may have been left out: the meaning says whether it is needed.
            if let Some(at) = locals.iter().position(|local| *local.name == **name) {
                let len = locals.get(at).map_or(0, Local::bytes);
                memory.push((at, name, HostBuffer::new(len)?));
            }
        }
        let parts = memory.iter_mut().filter_map(|(at, _, memory)| {
            Some(LocalMemory {
                local: *at,
                dtype: locals.get(*at)?.dtype,
                memory: memory.as_mut_slice(),
                zeroed: false,
            })
        });
        let ran = self.load_into(&locals, parts.collect(), load, options)?;
        let bytes = |name: &str| {
            let mut found = memory.iter().filter(|(_, one, _)| *one == name);
            found.next().map(|(_, _, bytes)| bytes.as_slice())
        };
        let values = shard.values(bytes)?;
        let values: Vec<u8> = values
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect();
        cast(Dtype::F32, &values, to, out)
            .map_err(|error| Error::from(error.tensor(&shard.name)))?;
        Ok(ran)
    }
}
