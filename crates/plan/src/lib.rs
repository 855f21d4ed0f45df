//! Who reads which bytes: plans for loading and saving on many ranks, and the proof that they hold.
//!
//! A [`Request`] says which tensors are wanted, put together from what ([`Expr`]), and what each axis
//! of a [`Mesh`] does to them ([`Placement`]). [`build`] turns it, with the [`Table`] of what bytes
//! exist, into a [`Plan`]: for every rank its local tensors, each filled by a few strided copies
//! ([`Nest`]), whose numbers are bits, so that dtypes below a byte are no special case.
//!
//! This crate moves no bytes, opens no files and starts no threads. Equal inputs give equal plans.

#![forbid(unsafe_code)]

mod build;
mod error;
pub mod exchange;
mod expr;
pub mod io;
mod json;
mod limits;
mod lower;
mod mesh;
mod pattern;
mod placement;
mod plan;
mod proof;
mod request;
mod rules;
pub mod save;
mod table;
pub mod view;

pub use build::build;
pub use error::{Error, Reason, Result};
pub use expr::Expr;
pub use mesh::{Mesh, MeshAxis};
pub use pattern::matches;
pub use placement::{Others, Placement, Uneven};
pub use plan::{Fill, Layout, Local, Loop, Nest, Plan, Region, Target};
pub use proof::Proof;
pub use request::{Allow, Place, Request, Wanted, Word};
pub use rules::{Rule, Rules};
pub use table::{File, Part, Parts, Source, Table};
pub use view::{Dims, View};
