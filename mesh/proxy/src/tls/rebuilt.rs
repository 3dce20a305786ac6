//! What is built from secrets, and again when one of them has changed: once for all who need it then.

use std::sync::Arc;

use arc_swap::ArcSwapOption;
use parking_lot::Mutex;

/// Of one moment of the secrets.
#[derive(Debug)]
struct Dated<T> {
    version: u64,
    value: Arc<T>,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Rebuilt<T> {
    latest: ArcSwapOption<Dated<T>>,
    building: Mutex<()>,
}

impl<T> Default for Rebuilt<T> {
    fn default() -> Self {
        Self {
            latest: ArcSwapOption::empty(),
            building: Mutex::new(()),
        }
    }
}

impl<T> Rebuilt<T> {
    /// What was built of `version`, or is now. `again` is called where it takes the place of an earlier one. Nothing while
    /// secrets are missing.
    pub(super) fn current(
        &self,
        version: u64,
        build: impl FnOnce() -> Option<T>,
        again: impl FnOnce(),
    ) -> Option<Arc<T>> {
        let fresh = |latest: &Option<Arc<Dated<T>>>| {
            let latest = latest.as_ref().filter(|latest| latest.version == version)?;
            Some(latest.value.clone())
        };
        if let Some(value) = fresh(&self.latest.load_full()) {
            return Some(value);
        }
        let _building = self.building.lock();
        let before = self.latest.load_full();
        if let Some(value) = fresh(&before) {
            return Some(value);
        }
        let value = Arc::new(build()?);
        if before.is_some() {
            again();
        }
        self.latest.store(Some(Arc::new(Dated {
            version,
            value: value.clone(),
        })));
        Some(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_is_built_once_and_another_takes_its_place_when_it_can_be_built() {
        let rebuilt = Rebuilt::default();
        let told = std::cell::Cell::new(0);
        let current = |version, value: Option<&'static str>| {
            let value = rebuilt.current(version, || value, || told.set(told.get() + 1));
            value.map(|value| *value)
        };
        assert_eq!(current(1, None), None);
        assert_eq!(current(1, Some("one")), Some("one"));
        assert_eq!(current(1, Some("never built")), Some("one"));
        assert_eq!(told.get(), 0);
        assert_eq!(current(2, None), None, "what it was built from has changed");
        assert_eq!(current(2, Some("two")), Some("two"));
        assert_eq!((current(2, None), told.get()), (Some("two"), 1));
    }
}
