use crate::source::tree_testing::snapshot;

use super::*;

fn text(s: &Snapshot, path: &str) -> Option<String> {
    s.read(path).unwrap().map(|b| String::from_utf8(b).unwrap())
}

#[test]
fn files_and_directories_are_read_from_the_tree() {
    let (_dir, s) = snapshot(&[("a/b.yaml", "one"), ("c.yaml", "two")], None, &[]);
    assert_eq!(text(&s, "./a/../a/b.yaml").as_deref(), Some("one"));
    assert_eq!(text(&s, "a"), None);
    assert_eq!(text(&s, "../c.yaml"), None, "there is nothing above the root");
    assert_eq!(
        s.list("").unwrap().unwrap(),
        vec![("a".to_string(), true), ("c.yaml".to_string(), false)]
    );
    assert_eq!(s.list("nowhere").unwrap(), None);
}

#[test]
fn links_are_followed_inside_the_tree_and_lead_nowhere_outside() {
    let files = [
        ("base/app.yaml", "app"),
        ("overlay/app.yaml", "-> ../base/app.yaml"),
        ("alias", "-> base"),
        ("escape", "-> ../../etc/passwd"),
        ("absolute", "-> /etc/passwd"),
        ("loop", "-> loop"),
    ];
    let (_dir, s) = snapshot(&files, None, &[]);
    assert_eq!(text(&s, "overlay/app.yaml").as_deref(), Some("app"));
    assert_eq!(text(&s, "alias/app.yaml").as_deref(), Some("app"));
    for path in ["escape", "absolute", "loop"] {
        assert_eq!(text(&s, path), None, "{path}");
    }
    let names: Vec<String> = s.list("").unwrap().unwrap().into_iter().map(|(n, _)| n).collect();
    assert_eq!(names, ["alias", "base", "overlay"]);
}

#[test]
fn sourceignore_files_hold_for_their_directory_and_spec_ignore_beats_them() {
    let files = [
        (".sourceignore", "*.txt\n"),
        ("a.txt", "1"),
        ("apps/.sourceignore", "!keep.txt\nsecret.yaml\n"),
        ("apps/keep.txt", "2"),
        ("apps/secret.yaml", "3"),
        ("secret.yaml", "4"),
    ];
    let (_dir, s) = snapshot(&files, None, &[]);
    assert_eq!(text(&s, "a.txt"), None);
    assert_eq!(text(&s, "apps/keep.txt").as_deref(), Some("2"));
    assert_eq!(text(&s, "apps/secret.yaml"), None);
    assert_eq!(text(&s, "secret.yaml").as_deref(), Some("4"));
    let (_dir, s) = snapshot(&files, Some("!apps/secret.yaml"), &[]);
    assert_eq!(text(&s, "apps/secret.yaml").as_deref(), Some("3"));
}

#[test]
fn sparse_checkout_shows_the_named_directories_and_names_a_missing_one() {
    let files = [("a/x.yaml", "1"), ("b/x.yaml", "2"), ("root.yaml", "3")];
    let (_dir, s) = snapshot(&files, None, &["./a"]);
    assert_eq!(text(&s, "a/x.yaml").as_deref(), Some("1"));
    assert_eq!(text(&s, "b/x.yaml"), None);
    assert_eq!(text(&s, "root.yaml").as_deref(), Some("3"));
    assert_eq!(s.missing_sparse().unwrap(), None);
    let (_dir, s) = snapshot(&files, None, &["nowhere"]);
    assert_eq!(s.missing_sparse().unwrap(), Some("nowhere"));
}
