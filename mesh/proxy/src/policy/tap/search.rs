//! Texts that are looked for in a body while it passes, also where they are cut in two.

use std::sync::Arc;

use serin_xds::pb::envoy::config::tap::v3 as tap;
use serin_xds::pb::envoy::config::tap::v3::http_generic_body_match::generic_text_match::Rule;

use crate::error::Refusal;

/// Texts of one condition.
const MAX_PATTERNS: usize = 32;
/// Bytes of one text.
const MAX_PATTERN: usize = 4096;

/// What is looked for: all of some texts (`HttpGenericBodyMatch`).
#[derive(Debug)]
pub struct Search {
    patterns: Box<[Box<[u8]>]>,
    /// In so many bytes from the start.
    limit: usize,
}

impl Search {
    pub(super) fn compile(from: &tap::HttpGenericBodyMatch) -> Result<Self, Refusal> {
        if from.patterns.is_empty() || from.patterns.len() > MAX_PATTERNS {
            return Err(Refusal::new(
                "patterns",
                format!("between 1 and {MAX_PATTERNS} are needed"),
            ));
        }
        let patterns = from.patterns.iter().enumerate().map(|(index, pattern)| {
            let bytes = match &pattern.rule {
                Some(Rule::StringMatch(text)) => text.as_bytes(),
                Some(Rule::BinaryMatch(bytes)) => bytes,
                None => &[],
            };
            if bytes.is_empty() || bytes.len() > MAX_PATTERN {
                return Err(Refusal::new(
                    format!("patterns[{index}]"),
                    format!("must have between 1 and {MAX_PATTERN} bytes"),
                ));
            }
            Ok(bytes.into())
        });
        Ok(Self {
            patterns: patterns.collect::<Result<_, _>>()?,
            limit: match from.bytes_limit {
                0 => usize::MAX,
                limit => limit as usize,
            },
        })
    }
}

/// A search on its way through one body.
#[derive(Debug)]
pub struct Searching {
    searches: Arc<[Search]>,
    /// For each search, the texts that have been found.
    found: Vec<Vec<bool>>,
    /// The last bytes that have passed, in which a text may have begun.
    tail: Vec<u8>,
    longest: usize,
    passed: usize,
}

impl Searching {
    /// For a body that begins.
    pub fn new(searches: &Arc<[Search]>) -> Self {
        let all = || searches.iter().flat_map(|search| &search.patterns);
        Self {
            found: searches
                .iter()
                .map(|search| vec![false; search.patterns.len()])
                .collect(),
            searches: searches.clone(),
            tail: Vec::new(),
            longest: all().map(|pattern| pattern.len()).max().unwrap_or(0),
            passed: 0,
        }
    }

    /// Bytes of the body.
    pub fn feed(&mut self, data: &[u8]) {
        if self.searches.is_empty() {
            return;
        }
        let start = self.passed - self.tail.len();
        self.tail.extend_from_slice(data);
        for (search, found) in self.searches.iter().zip(&mut self.found) {
            let room = search.limit.saturating_sub(start).min(self.tail.len());
            let within = &self.tail[..room];
            for (pattern, found) in search.patterns.iter().zip(found) {
                *found = *found || within.windows(pattern.len()).any(|window| *window == **pattern);
            }
        }
        self.passed += data.len();
        let kept = self.tail.len().min(self.longest - 1);
        self.tail.drain(..self.tail.len() - kept);
    }

    /// Whether a search has found all that it looks for.
    pub fn has_found(&self, index: usize) -> bool {
        self.found
            .get(index)
            .is_some_and(|texts| texts.iter().all(|found| *found))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serin_xds::pb::envoy::config::tap::v3::http_generic_body_match::GenericTextMatch;

    use super::*;

    fn search(limit: u32, patterns: &[&[u8]]) -> Result<Search, Refusal> {
        Search::compile(&tap::HttpGenericBodyMatch {
            bytes_limit: limit,
            patterns: patterns
                .iter()
                .map(|bytes| GenericTextMatch {
                    rule: Some(Rule::BinaryMatch(bytes.to_vec())),
                })
                .collect(),
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]

        #[test]
        fn a_text_is_found_however_the_body_is_cut(
            body in proptest::collection::vec(0u8..3, 0..40),
            cuts in proptest::collection::vec(0usize..40, 0..5),
            first in proptest::collection::vec(0u8..3, 1..4),
            second in proptest::collection::vec(0u8..3, 1..6),
            limit in 0u32..45,
        ) {
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(body.len())).collect();
            cuts.extend([0, body.len()]);
            cuts.sort_unstable();
            let searches: Arc<[Search]> = [search(limit, &[&first, &second]).unwrap(), search(0, &[&first]).unwrap()].into();
            let mut searching = Searching::new(&searches);
            for pair in cuts.windows(2) {
                searching.feed(&body[pair[0]..pair[1]]);
            }
            let has = |body: &[u8], text: &[u8]| body.windows(text.len()).any(|window| window == text);
            let within = if limit == 0 { &body[..] } else { &body[..body.len().min(limit as usize)] };
            prop_assert_eq!(searching.has_found(0), has(within, &first) && has(within, &second));
            prop_assert_eq!(searching.has_found(1), has(&body, &first));
        }
    }

    #[test]
    fn texts_that_cannot_be_looked_for_are_refused_with_their_path() {
        assert_eq!(search(0, &[]).unwrap_err().path, "patterns");
        assert_eq!(search(0, &[b"a", b""]).unwrap_err().path, "patterns[1]");
        let long = vec![0; MAX_PATTERN + 1];
        assert_eq!(search(0, &[&long]).unwrap_err().path, "patterns[0]");
    }
}
