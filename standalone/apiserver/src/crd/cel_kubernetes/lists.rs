//! Functions of lists, and of texts by regular expressions.

use std::cmp::Ordering;

use cel::common::traits::Iterable;
use cel::common::types::{CelBool, CelInt, CelList, CelString, DYN_TYPE, LIST_TYPE};
use cel::common::value::{CowVal, Val};
use cel::{DeclarationError, Env, add_member_overload};
use regex::Regex;

use super::{Outcome, Text, failed};

pub(super) fn extension(env: &mut Env) -> Result<(), DeclarationError> {
    env.add_member_overload("sum", "list.sum()", LIST_TYPE, vec![], sum)?;
    env.add_member_overload("min", "list.min()", LIST_TYPE, vec![], min)?;
    env.add_member_overload("max", "list.max()", LIST_TYPE, vec![], max)?;
    env.add_member_overload("isSorted", "list.isSorted()", LIST_TYPE, vec![], is_sorted)?;
    let any = || vec![DYN_TYPE];
    env.add_member_overload("indexOf", "list.indexOf(dyn)", LIST_TYPE, any(), index_of)?;
    env.add_member_overload(
        "lastIndexOf",
        "list.lastIndexOf(dyn)",
        LIST_TYPE,
        any(),
        last_index_of,
    )?;
    add_member_overload!(env, fn find: (CelString, CelString) -> Result<CelString>)?;
    add_member_overload!(env, fn find_all: (CelString, CelString) -> Result<CelList>)?;
    add_member_overload!(env, fn find_some: (CelString, CelString, CelInt) -> Result<CelList>, name = "findAll")?;
    Ok(())
}

/// The items of the list that a function was called on.
fn items<'a, 'v>(args: &'a [CowVal<'_, 'v>], function: &str) -> Outcome<Vec<&'a (dyn Val + 'v)>> {
    let Some(list) = args.first().and_then(|list| list.as_iterable()) else {
        return failed(function, "not a list");
    };
    let mut found = Vec::new();
    let mut all = Iterable::iter(list);
    while let Some(item) = all.next() {
        found.push(item);
    }
    Ok(found)
}

fn order(one: &dyn Val, other: &dyn Val, function: &str) -> Outcome<Ordering> {
    let compared = one.as_comparer().map(|one| one.compare(other));
    match compared {
        Some(outcome) => outcome,
        None => failed(function, "items cannot be compared"),
    }
}

fn sum<'b, 'v>(args: Vec<CowVal<'b, 'v>>) -> Outcome<CowVal<'b, 'v>> {
    let items = items(&args, "sum")?;
    let mut total: Option<Box<dyn Val + 'v>> = None;
    for item in items {
        let Some(adder) = item.as_adder() else {
            return failed("sum", "items cannot be added");
        };
        total = Some(match &total {
            None => item.clone_as_boxed(),
            Some(total) => adder.add(total.as_ref())?.into_owned(),
        });
    }
    // Of nothing it is 0: what the items would be is not known.
    Ok(total.map_or_else(|| CowVal::owned(CelInt::from(0)), CowVal::Owned))
}

fn extreme<'b, 'v>(args: &[CowVal<'b, 'v>], function: &str, wanted: Ordering) -> Outcome<CowVal<'b, 'v>> {
    let mut best: Option<&(dyn Val + 'v)> = None;
    for item in items(args, function)? {
        best = match best {
            Some(known) if order(item, known, function)? != wanted => Some(known),
            _ => Some(item),
        };
    }
    match best {
        Some(best) => Ok(CowVal::Owned(best.clone_as_boxed())),
        None => failed(function, format!("{function} called on empty list")),
    }
}

fn min<'b, 'v>(args: Vec<CowVal<'b, 'v>>) -> Outcome<CowVal<'b, 'v>> {
    extreme(&args, "min", Ordering::Less)
}

fn max<'b, 'v>(args: Vec<CowVal<'b, 'v>>) -> Outcome<CowVal<'b, 'v>> {
    extreme(&args, "max", Ordering::Greater)
}

fn is_sorted<'b, 'v>(args: Vec<CowVal<'b, 'v>>) -> Outcome<CowVal<'b, 'v>> {
    let items = items(&args, "isSorted")?;
    for pair in items.windows(2) {
        if let [one, next] = pair
            && order(*one, *next, "isSorted")? == Ordering::Greater
        {
            return Ok(CowVal::owned(CelBool::from(false)));
        }
    }
    Ok(CowVal::owned(CelBool::from(true)))
}

fn place(args: &[CowVal<'_, '_>], function: &str, last: bool) -> Outcome<CelInt> {
    let items = items(args, function)?;
    let Some(wanted) = args.get(1) else {
        return failed(function, "no item to look for");
    };
    let same = |item: &&dyn Val| item.equals(&**wanted);
    let found = if last {
        items.iter().rposition(|item| same(&(*item as &dyn Val)))
    } else {
        items.iter().position(|item| same(&(*item as &dyn Val)))
    };
    Ok(CelInt::from(
        found.map_or(-1, |at| i64::try_from(at).unwrap_or(-1)),
    ))
}

fn index_of<'b, 'v>(args: Vec<CowVal<'b, 'v>>) -> Outcome<CowVal<'b, 'v>> {
    place(&args, "indexOf", false).map(CowVal::owned)
}

fn last_index_of<'b, 'v>(args: Vec<CowVal<'b, 'v>>) -> Outcome<CowVal<'b, 'v>> {
    place(&args, "lastIndexOf", true).map(CowVal::owned)
}

fn pattern(text: &Text<'_>, function: &str) -> Outcome<Regex> {
    Regex::new(text.inner()).or_else(|error| failed(function, error))
}

fn find(this: &Text<'_>, expression: &Text<'_>) -> Outcome<Text<'static>> {
    let found = pattern(expression, "find")?
        .find(this.inner())
        .map_or_else(String::new, |found| found.as_str().to_owned());
    Ok(CelString::from(found))
}

fn find_all(this: &Text<'_>, expression: &Text<'_>) -> Outcome<CelList<'static>> {
    find_some(this, expression, &CelInt::from(-1))
}

fn find_some(this: &Text<'_>, expression: &Text<'_>, most: &CelInt) -> Outcome<CelList<'static>> {
    let pattern = pattern(expression, "findAll")?;
    let most = usize::try_from(*most.inner()).unwrap_or(usize::MAX);
    let found: Vec<Box<dyn Val>> = pattern
        .find_iter(this.inner())
        .take(most)
        .map(|found| Box::new(CelString::from(found.as_str().to_owned())) as Box<dyn Val>)
        .collect();
    Ok(CelList::from(found))
}
