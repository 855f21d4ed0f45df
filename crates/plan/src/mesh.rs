//! Meshes: ranks, arranged along named axes.
//!
//! A rank is the row-major position of its coordinates. The same ranks may be factorised in several
//! ways: experts may see 8 ranks as `ep=8` that all else sees as `fsdp=2, tp=4`.

use crate::error::{Error, Reason, Result};
use crate::limits;

/// Ranks along named axes, outermost first, and other factorisations of the same ranks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mesh {
    axes: Vec<(String, u32)>,
    alt: Vec<Vec<(String, u32)>>,
    size: u64,
}

/// An axis of a mesh, as ranks see it: `rank / stride % size`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MeshAxis {
    /// How far apart the ranks of neighbours are.
    pub stride: u32,
    /// How many coordinates it has.
    pub size: u32,
}

impl MeshAxis {
    /// The coordinate of a rank.
    pub fn coordinate(self, rank: u32) -> u32 {
        rank / self.stride % self.size
    }
}

fn wrong(found: impl std::fmt::Display, needed: impl std::fmt::Display) -> Error {
    Error::new(Reason::Mesh).found(found).needed(needed)
}

fn product(axes: &[(String, u32)]) -> Result<u64> {
    let mut product = 1_u64;
    for (at, (name, size)) in axes.iter().enumerate() {
        product = product
            .checked_mul(u64::from(*size))
            .filter(|&ranks| ranks > 0 && ranks <= limits::RANKS)
            .ok_or_else(|| {
                wrong(
                    format_args!("axis {name:?} of {size}"),
                    format_args!("1 to {} ranks in all", limits::RANKS),
                )
            })?;
        if name.is_empty() || axes.iter().take(at).any(|(other, _)| other == name) {
            return Err(wrong(
                format_args!("axis {name:?}"),
                "each axis once, with a name",
            ));
        }
    }
    if axes.len() > limits::AXES {
        return Err(wrong(
            format_args!("{} axes", axes.len()),
            format_args!("at most {}", limits::AXES),
        ));
    }
    Ok(product)
}

fn find(axes: &[(String, u32)], name: &str) -> Option<MeshAxis> {
    let mut stride = 1;
    for (axis, size) in axes.iter().rev() {
        if axis == name {
            return Some(MeshAxis {
                stride,
                size: *size,
            });
        }
        stride *= size;
    }
    None
}

impl Mesh {
    /// A mesh of these axes, outermost first.
    ///
    /// # Errors
    /// [`Reason::Mesh`] for an axis of size 0, a name twice, too many ranks.
    pub fn new(axes: &[(&str, u32)]) -> Result<Mesh> {
        let owned = axes.iter().map(|(name, size)| ((*name).to_owned(), *size));
        Mesh::with_alt(owned.collect(), Vec::new())
    }

    /// A mesh with other factorisations of the same ranks. An axis that two of them share must
    /// mean the same ranks in both.
    ///
    /// # Errors
    /// As [`Mesh::new`], and for a factorisation of another number of ranks.
    pub fn with_alt(axes: Vec<(String, u32)>, alt: Vec<Vec<(String, u32)>>) -> Result<Mesh> {
        let size = product(&axes)?;
        if alt.len() > limits::AXES {
            return Err(wrong(
                format_args!("{} factorisations", alt.len()),
                format_args!("at most {}", limits::AXES),
            ));
        }
        let mesh = Mesh { axes, alt, size };
        for form in &mesh.alt {
            let ranks = product(form)?;
            if ranks != size {
                return Err(wrong(
                    format_args!("another factorisation of {ranks} ranks"),
                    format_args!("one of the {size} of the mesh"),
                ));
            }
            for (name, _) in form {
                if mesh.axis(name) != find(form, name) {
                    return Err(wrong(
                        format_args!("axis {name:?} of other ranks in another factorisation"),
                        "an axis that means the same ranks in both",
                    ));
                }
            }
        }
        Ok(mesh)
    }

    /// The axes, outermost first.
    pub fn axes(&self) -> &[(String, u32)] {
        &self.axes
    }

    /// The other factorisations.
    pub fn alt(&self) -> &[Vec<(String, u32)>] {
        &self.alt
    }

    /// How many ranks there are.
    pub fn size(&self) -> u32 {
        self.size as u32
    }

    /// An axis by its name, of any factorisation.
    pub fn axis(&self, name: &str) -> Option<MeshAxis> {
        std::iter::once(&self.axes)
            .chain(&self.alt)
            .find_map(|form| find(form, name))
    }

    /// The coordinate of a rank on an axis.
    ///
    /// # Errors
    /// [`Reason::UnknownAxis`].
    pub fn coordinate(&self, rank: u32, name: &str) -> Result<u32> {
        let axis = self.axis(name).ok_or_else(|| self.unknown(name))?;
        Ok(axis.coordinate(rank))
    }

    /// The error that there is no such axis.
    pub(crate) fn unknown(&self, name: &str) -> Error {
        let mut names: Vec<&str> = Vec::new();
        for (axis, _) in std::iter::once(&self.axes).chain(&self.alt).flatten() {
            if !names.contains(&axis.as_str()) {
                names.push(axis);
            }
        }
        Error::new(Reason::UnknownAxis)
            .found(format_args!("axis {name:?}"))
            .needed(format_args!("one of {names:?}"))
    }

    /// These axes in the order in which their placements are applied: the order of the first
    /// factorisation that has all of them.
    ///
    /// # Errors
    /// [`Reason::UnknownAxis`], and [`Reason::Mesh`] for axes that no factorisation has together:
    /// they divide the same ranks in two ways.
    pub(crate) fn in_order<'a>(&'a self, names: &[&str]) -> Result<Vec<(&'a str, MeshAxis)>> {
        for form in std::iter::once(&self.axes).chain(&self.alt) {
            if names.iter().all(|name| find(form, name).is_some()) {
                let used = form
                    .iter()
                    .filter(|(name, _)| names.contains(&name.as_str()));
                return Ok(used
                    .filter_map(|(name, _)| Some((name.as_str(), find(form, name)?)))
                    .collect());
            }
        }
        match names.iter().find(|name| self.axis(name).is_none()) {
            Some(name) => Err(self.unknown(name)),
            None => Err(wrong(
                format_args!("a tensor placed on {names:?}"),
                "axes of one factorisation of the mesh",
            )),
        }
    }
}
