//! `convert`: a copy in another container.

use tonnage::gguf::convert;

use crate::args::{Common, Convert};
use crate::exit::Failure;
use crate::terminal::Out;

use super::write::Copying;

/// Runs the verb.
pub fn run(args: &Convert, common: &Common, out: &mut Out) -> Result<u8, Failure> {
    let max_size = args.max_size.as_deref().map(super::size).transpose()?;
    let checkpoint = super::open(&args.target.input, common)?;
    let copying = Copying::to(&args.target, max_size);
    let tensors = checkpoint.len() as u64;
    copying.with(tensors, common, out, |save| {
        convert(&checkpoint, &args.target.output, save)
    })
}
