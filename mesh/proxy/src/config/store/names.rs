//! Names that configuration refers to: who does, whether the control plane has answered for them, and what has changed
//! since that was asked last. Kept up as resources come and go, so that nobody looks through all names for a change.

use std::collections::BTreeMap;
use std::sync::Arc;

use serin_xds::client::NameChanges;

#[derive(Debug)]
struct Reference {
    /// Resources that refer to the name; one that does so twice is here twice.
    users: Vec<Arc<str>>,
    answered: bool,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Names {
    names: BTreeMap<Arc<str>, Reference>,
    /// How many have not been answered for.
    cold: usize,
    changes: NameChanges,
}

impl Names {
    /// One more user of a name. `known` says whether what it stands for is here already.
    pub(super) fn hold(&mut self, name: &str, user: &Arc<str>, known: bool) {
        if let Some(reference) = self.names.get_mut(name) {
            reference.users.push(user.clone());
            return;
        }
        let name: Arc<str> = name.into();
        self.cold += usize::from(!known);
        self.changes.add(name.clone());
        let reference = Reference {
            users: vec![user.clone()],
            answered: known,
        };
        self.names.insert(name, reference);
    }

    /// One user less; whether it was the last.
    pub(super) fn release(&mut self, name: &str, user: &str) -> bool {
        let Some(reference) = self.names.get_mut(name) else {
            return false;
        };
        if let Some(at) = reference.users.iter().position(|own| **own == *user) {
            reference.users.swap_remove(at);
        }
        if !reference.users.is_empty() {
            return false;
        }
        self.cold -= usize::from(!reference.answered);
        if let Some((name, _)) = self.names.remove_entry(name) {
            self.changes.remove(name);
        }
        true
    }

    /// The control plane has said what it stands for, or that it is nothing.
    pub(super) fn answer(&mut self, name: &str) {
        if let Some(reference) = self.names.get_mut(name)
            && !std::mem::replace(&mut reference.answered, true)
        {
            self.cold -= 1;
        }
    }

    pub(super) fn is_answered(&self, name: &str) -> bool {
        self.names.get(name).is_some_and(|reference| reference.answered)
    }

    pub(super) fn is_held(&self, name: &str) -> bool {
        self.names.contains_key(name)
    }

    pub(super) fn is_held_by(&self, name: &str, user: &str) -> bool {
        self.users(name).iter().any(|own| **own == *user)
    }

    pub(super) fn users(&self, name: &str) -> &[Arc<str>] {
        self.names
            .get(name)
            .map_or(&[], |reference| reference.users.as_slice())
    }

    /// Whether all have been answered for.
    pub(super) fn is_complete(&self) -> bool {
        self.cold == 0
    }

    /// Names that have not been answered for.
    pub(super) fn cold(&self) -> impl Iterator<Item = &Arc<str>> {
        self.names
            .iter()
            .filter(|(_, reference)| !reference.answered)
            .map(|(name, _)| name)
    }

    pub(super) fn all(&self) -> impl Iterator<Item = &Arc<str>> {
        self.names.keys()
    }

    /// What has changed since this was asked last.
    pub(super) fn take_changes(&mut self) -> NameChanges {
        std::mem::take(&mut self.changes)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]

        #[test]
        fn who_follows_the_changes_knows_the_names_and_the_count_of_cold_ones_is_that_of_the_list(
            steps in proptest::collection::vec((0u8..5, 0u8..4, 0u8..3), 0..120)
        ) {
            let mut names = Names::default();
            let mut held: Vec<(String, Arc<str>)> = Vec::new();
            let mut client = serin_xds::client::state::ClientState::new(Default::default());
            let endpoints = serin_xds::ResourceType::Endpoints;
            for (step, name, user) in steps {
                let (name, user): (String, Arc<str>) = (format!("n{name}"), format!("u{user}").into());
                match step {
                    0 | 1 => {
                        names.hold(&name, &user, step == 1);
                        held.push((name, user));
                    }
                    2 => names.answer(&name),
                    3 => {
                        if let Some(at) = held.iter().position(|own| *own == (name.clone(), user.clone())) {
                            held.swap_remove(at);
                            let last = !held.iter().any(|(own, _)| *own == name);
                            prop_assert_eq!(names.release(&name, &user), last);
                        }
                    }
                    _ => client.change_interest(endpoints, names.take_changes()),
                }
                prop_assert_eq!(names.is_complete(), names.cold().next().is_none());
            }
            client.change_interest(endpoints, names.take_changes());
            let expected: BTreeSet<&str> = held.iter().map(|(name, _)| name.as_str()).collect();
            prop_assert!(names.all().map(|name| &**name).eq(expected.iter().copied()));
            prop_assert!(client.interest(endpoints).names.iter().map(|name| &**name).eq(expected));
        }
    }
}
