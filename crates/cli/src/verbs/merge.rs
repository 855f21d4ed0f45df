//! `merge`: a copy as one file.

use crate::args::{Common, Merge};
use crate::exit::Failure;
use crate::terminal::Out;

use super::write::Copying;

/// Runs the verb.
pub fn run(args: &Merge, common: &Common, out: &mut Out) -> Result<u8, Failure> {
    let checkpoint = super::open(&args.target.input, common)?;
    let copying = Copying::to(&args.target, None);
    copying.run(
        &checkpoint,
        |tensor| Ok((tensor.name(), tensor.dtype()?)),
        common,
        out,
    )
}
