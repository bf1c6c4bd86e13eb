//! Images in memory: bodies in a slab, one index of names for each session, wait-lists under the same
//! names. Nothing here knows whether a descriptor is ready.

pub mod body;
pub mod catalog;
pub mod limit;
pub mod spill;
pub mod waits;

pub use body::{Bodies, BodyId, Content, Files, INLINE_MAX};
pub use catalog::{Catalog, Image};
pub use spill::SpillFile;
pub use waits::Waits;
