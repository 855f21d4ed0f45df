//! From what every rank has to who writes what: the façade's door to `tonnage_plan::save`.

use std::collections::BTreeMap;

use tonnage_format::WriteOptions;
use tonnage_plan::save::{Offer, SavePlan, plan_save};

use crate::error::{Error, Result};
use crate::shards::split;

/// Which tensors share a file.
#[derive(Clone, Debug)]
pub enum Grouping {
    /// As [`crate::save()`] splits them: at most so many bytes a file, or all in one.
    Size(Option<u64>),
    /// Each tensor names the number of its file, from 1 on.
    Given(BTreeMap<String, usize>),
    /// Each rank has files of its own, so there are none to share.
    None,
}

/// Decides who writes what, from what each rank says that it has, and proves that every byte of every file is
/// written once.
///
/// # Errors
/// What `tonnage_plan::save::plan_save` refuses, under its codes (`PLAN_DESTINATION` for a hole or an overlap,
/// `PLAN_DISAGREE`, …); `PLAN_FORM` for an offer that cannot be read, with its rank, or a tensor without a
/// file.
pub fn agree(
    offers: &[impl AsRef<[u8]>],
    grouping: &Grouping,
    write: &WriteOptions,
) -> Result<(SavePlan, Vec<Offer>)> {
    let parse = |(rank, text): (usize, &_)| {
        let text: &[u8] = AsRef::as_ref(text);
        serde_json::from_slice::<Offer>(text)
            .map_err(|e| Error::usage("PLAN_FORM", format!("what rank {rank} offers: {e}")))
    };
    let offers = offers
        .iter()
        .enumerate()
        .map(parse)
        .collect::<Result<Vec<Offer>>>()?;
    let plan = plan_save(&offers, write, |tensors, sizes| match grouping {
        Grouping::Size(most) => Ok(split(sizes.iter().copied(), *most)),
        Grouping::Given(numbers) => given(tensors, numbers),
        Grouping::None => Ok((0..tensors.len()).map(|tensor| vec![tensor]).collect()),
    });
    match plan {
        Ok(plan) => Ok((plan, offers)),
        Err(error) => {
            let refused = Error::usage(error.code(), error.to_string());
            Err(match error.tensor_name() {
                Some(name) => refused.about(name, None),
                None => refused,
            })
        }
    }
}

/// The tensors by the numbers of their files, which are to be 1, 2, … without a gap.
fn given(
    tensors: &[tonnage_plan::save::Saved],
    numbers: &BTreeMap<String, usize>,
) -> tonnage_plan::Result<Vec<Vec<usize>>> {
    use tonnage_plan::{Error, Reason};
    let mut files: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    for (at, tensor) in tensors.iter().enumerate() {
        match numbers.get(&tensor.name) {
            Some(&number) if number > 0 => files.entry(number).or_default().push(at),
            _ => {
                return Err(Error::new(Reason::Form)
                    .tensor(&tensor.name)
                    .found("no file is named for it"));
            }
        }
    }
    let most = numbers.values().copied().max().unwrap_or(0);
    if files.len() < most {
        let lacks = (1..=most)
            .find(|number| !files.contains_key(number))
            .unwrap_or(0);
        return Err(
            Error::new(Reason::Form).found(format_args!("no tensor for file {lacks} of {most}"))
        );
    }
    Ok(files.into_values().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    const OFFER: &str = r#"{"tensors":[
        {"name":"a","dtype":"F32","shape":[4],"boxes":[[[0],[4]]]},
        {"name":"b","dtype":"F32","shape":[4],"boxes":[[[0],[4]]]}]}"#;

    fn files(grouping: &Grouping) -> Result<Vec<Vec<usize>>> {
        let plan = agree(&[OFFER], grouping, &WriteOptions::default())?.0;
        Ok(plan.files.into_iter().map(|file| file.tensors).collect())
    }

    #[test]
    fn files_are_shared_as_was_asked() {
        assert_eq!(files(&Grouping::Size(None)).unwrap(), [[0, 1]]);
        assert_eq!(files(&Grouping::Size(Some(16))).unwrap(), [[0], [1]]);
        let given = |pairs: &[(&str, usize)]| {
            let numbers = pairs
                .iter()
                .map(|(name, n)| ((*name).to_owned(), *n))
                .collect();
            files(&Grouping::Given(numbers))
        };
        assert_eq!(given(&[("a", 2), ("b", 1)]).unwrap(), [[1], [0]]);
        for wrong in [
            &[("a", 1)][..],
            &[("a", 0), ("b", 1)],
            &[("a", 1), ("b", 1), ("c", 2)],
        ] {
            assert_eq!(given(wrong).unwrap_err().code(), "PLAN_FORM");
        }
        // A file number may be so large that nobody could make that many.
        assert_eq!(
            given(&[("a", usize::MAX), ("b", 1)]).unwrap_err().code(),
            "PLAN_FORM"
        );
    }

    #[test]
    fn an_offer_that_cannot_be_read_names_its_rank() {
        let error = agree(&[OFFER, "{"], &Grouping::None, &WriteOptions::default()).unwrap_err();
        assert!(error.to_string().contains("rank 1"), "{error}");
        let half = OFFER.replace("[[0],[4]]", "[[0],[3]]");
        let error = agree(&[&half], &Grouping::None, &WriteOptions::default()).unwrap_err();
        assert_eq!(
            (error.code(), error.tensor()),
            ("PLAN_DESTINATION", Some("a"))
        );
    }
}
