//! Compiled messages of which many are alike: equal ones are one.
//!
//! A control plane writes the same retry policy into every route of a mesh. The last few are remembered as bytes, weakly, so
//! that a route whose policy is one of them shares it; what nobody uses any more goes.

use std::sync::{Arc, Weak};

use prost::Message;

/// Messages that are remembered: more than a mesh writes kinds of in turn, few enough to be compared one by one.
const MAX: usize = 16;

/// See the module.
#[derive(Debug)]
pub(crate) struct Equal<T> {
    /// The one that was asked for last comes first.
    known: Vec<(Box<[u8]>, Weak<T>)>,
}

impl<T> Default for Equal<T> {
    fn default() -> Self {
        Self { known: Vec::new() }
    }
}

impl<T> Equal<T> {
    /// What was compiled of an equal message, if somebody still uses it, or else what `compile` makes of it.
    pub(crate) fn of<E>(
        &mut self,
        message: &impl Message,
        compile: impl FnOnce() -> Result<Option<T>, E>,
    ) -> Result<Option<Arc<T>>, E> {
        let bytes = message.encode_to_vec();
        if let Some(at) = self.known.iter().position(|(known, _)| **known == *bytes) {
            let entry = self.known.remove(at);
            if let Some(same) = entry.1.upgrade() {
                self.known.insert(0, entry);
                return Ok(Some(same));
            }
        }
        let Some(made) = compile()?.map(Arc::new) else {
            return Ok(None);
        };
        self.known.truncate(MAX - 1);
        self.known.insert(0, (bytes.into(), Arc::downgrade(&made)));
        Ok(Some(made))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serin_xds::pb::google::protobuf::UInt32Value;

    use super::*;

    fn ask(known: &mut Equal<u32>, value: u32) -> Arc<u32> {
        let compile = || Ok::<_, ()>(Some(value));
        known.of(&UInt32Value { value }, compile).unwrap().unwrap()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn whatever_is_remembered_each_message_gets_what_it_would_compile_to(
            values in proptest::collection::vec((0u32..40, any::<bool>()), 1..200)
        ) {
            let mut known = Equal::default();
            let mut held = Vec::new();
            for (value, hold) in values {
                let got = ask(&mut known, value);
                prop_assert_eq!(*got, value);
                prop_assert!(known.known.len() <= MAX);
                if hold {
                    held.push(got);
                }
            }
        }
    }

    #[test]
    fn equal_messages_are_one_for_as_long_as_somebody_uses_it() {
        let mut known = Equal::default();
        let first = ask(&mut known, 1);
        for other in 2..10 {
            ask(&mut known, other);
        }
        assert!(Arc::ptr_eq(&first, &ask(&mut known, 1)));
        let weak = Arc::downgrade(&first);
        drop(first);
        assert!(weak.upgrade().is_none(), "what nobody uses is gone");
        assert_eq!(*ask(&mut known, 1), 1);
    }

    #[test]
    fn a_message_that_is_refused_or_says_nothing_is_not_remembered() {
        let mut known = Equal::<u32>::default();
        assert_eq!(known.of(&UInt32Value { value: 1 }, || Err("no")), Err("no"));
        assert_eq!(
            known.of(&UInt32Value { value: 1 }, || Ok::<_, ()>(None)),
            Ok(None)
        );
        assert_eq!(*ask(&mut known, 1), 1);
    }
}
