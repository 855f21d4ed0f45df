//! `shard`: a copy as several files with an index.

use crate::args::{Common, Shard};
use crate::exit::Failure;
use crate::terminal::Out;

use super::write::Copying;

/// Runs the verb.
pub fn run(args: &Shard, common: &Common, out: &mut Out) -> Result<u8, Failure> {
    let max_size = super::size(&args.max_size)?;
    let checkpoint = super::open(&args.target.input, common)?;
    let copying = Copying::to(&args.target, Some(max_size));
    copying.run(
        &checkpoint,
        |tensor| Ok((tensor.name(), tensor.dtype()?)),
        common,
        out,
    )
}
