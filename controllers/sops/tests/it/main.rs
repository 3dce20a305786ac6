//! Against files that the real `sops` wrote, kept in `tests/data`, and against the program itself where it is installed.

// A test that cannot go on says so by panicking.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::path::{Path, PathBuf};
use std::process::Command;

use proptest::prelude::*;
use serin_manifests::yaml::{ReadOptions, parse_document};
use serin_manifests::{Dialect, Limits, Value};
use serin_sops::{Error, Format, Keys, decrypt, decrypt_object, detect, is_encrypted};

fn data(name: &str) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/data")
        .join(name);
    std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn keys() -> Keys {
    let mut keys = Keys::new();
    keys.add_age(std::str::from_utf8(&data("key.txt")).unwrap())
        .unwrap();
    keys
}

/// The values of all documents of a text.
fn values(text: &[u8]) -> Vec<serde_json::Value> {
    let text = std::str::from_utf8(text).unwrap();
    let limits = Limits::default();
    serin_manifests::yaml::split_documents(text, "x", &limits)
        .unwrap()
        .into_iter()
        .filter_map(|(_, part)| parse(part))
        .map(|value| value.to_json().unwrap())
        .collect()
}

/// All scalars in their order.
fn leaves(value: &serde_json::Value) -> Vec<String> {
    match value {
        serde_json::Value::Array(items) => items.iter().flat_map(leaves).collect(),
        serde_json::Value::Object(entries) => {
            let mut all: Vec<String> = entries.values().flat_map(leaves).collect();
            // A renamed key moves.
            all.sort();
            all
        }
        scalar => vec![scalar.to_string()],
    }
}

fn parse(text: &str) -> Option<Value> {
    let limits = Limits::default();
    let options = ReadOptions {
        file: "x",
        line_offset: 0,
        dialect: Dialect::Kustomize,
        limits: &limits,
    };
    parse_document(text, &options).unwrap()
}

#[test]
fn files_that_sops_wrote_are_decrypted_to_what_sops_decrypts_them_to() {
    for name in [
        "all.yaml",
        "regex.yaml",
        "mac_only_encrypted.yaml",
        "documents.yaml",
        "two.yaml",
        "values.json",
    ] {
        let format = Format::of_path(name);
        let plain = decrypt(&data(name), format, format, &keys()).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(values(&plain), values(&data(&format!("{name}.plain"))), "{name}");
    }
}

#[test]
fn dotenv_files_keep_their_order_and_their_line_breaks() {
    let plain = decrypt(&data("values.env"), Format::Dotenv, Format::Dotenv, &keys()).unwrap();
    let expected = data("values.env.plain");
    let without_comments: String = std::str::from_utf8(&expected)
        .unwrap()
        .lines()
        .filter(|line| !line.starts_with('#'))
        .flat_map(|line| [line, "\n"])
        .collect();
    assert_eq!(std::str::from_utf8(&plain).unwrap(), without_comments);
}

#[test]
fn binary_files_come_back_byte_for_byte() {
    let plain = decrypt(&data("bytes.bin"), Format::Binary, Format::Binary, &keys()).unwrap();
    assert_eq!(plain, data("bytes.bin.plain"));
}

#[test]
fn the_format_is_seen_from_the_marks_of_sops() {
    assert_eq!(detect(&data("all.yaml")), Some(Format::Yaml));
    assert_eq!(detect(&data("values.json")), Some(Format::Json));
    assert_eq!(detect(&data("values.env")), Some(Format::Dotenv));
    assert_eq!(detect(&data("bytes.bin")), Some(Format::Binary));
    assert_eq!(detect(&data("all.yaml.plain")), None);
}

#[test]
fn a_value_that_was_changed_moved_or_left_out_is_noticed() {
    let text = String::from_utf8(data("regex.yaml")).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    let at = |start: &str| {
        lines
            .iter()
            .position(|line| line.trim_start().starts_with(start))
            .unwrap()
    };
    let (user, password) = (at("user:"), at("password:"));

    let mut swapped = lines.clone();
    let (a, b) = (
        lines[user].replace("user", "password"),
        lines[password].replace("password", "user"),
    );
    (swapped[user], swapped[password]) = (&a, &b);
    let moved = decrypt(swapped.join("\n").as_bytes(), Format::Yaml, Format::Yaml, &keys());
    assert!(
        matches!(moved, Err(Error::Value { ref path, .. }) if path.starts_with("stringData.")),
        "{moved:?}"
    );

    let mut cut = lines.clone();
    cut.remove(user);
    let left_out = decrypt(cut.join("\n").as_bytes(), Format::Yaml, Format::Yaml, &keys());
    assert_eq!(left_out, Err(Error::Mac));

    let renamed = text.replacen("name: creds", "name: other", 1);
    assert_ne!(renamed, text);
    let plain_value_changed = decrypt(renamed.as_bytes(), Format::Yaml, Format::Yaml, &keys());
    assert_eq!(plain_value_changed, Err(Error::Mac));
}

#[test]
fn values_outside_of_the_mac_may_change_when_the_file_says_so() {
    let text = String::from_utf8(data("mac_only_encrypted.yaml")).unwrap();
    let renamed = text.replacen("name: creds", "name: other", 1);
    let plain = decrypt(renamed.as_bytes(), Format::Yaml, Format::Yaml, &keys()).unwrap();
    assert_eq!(values(&plain)[0]["metadata"]["name"], "other");
}

#[test]
fn an_object_whose_keys_kustomize_sorted_is_decrypted_value_by_value() {
    let Some(Value::Map(mut object)) = parse(std::str::from_utf8(&data("regex.yaml")).unwrap()) else {
        panic!("not a mapping");
    };
    object.entries.reverse();
    if let Some(Value::Map(metadata)) = object.get_mut("metadata") {
        metadata.set("namespace", Value::string("elsewhere"));
    }
    assert!(is_encrypted(&object));
    decrypt_object(&mut object, &keys()).unwrap();
    assert!(!is_encrypted(&object));
    let json = Value::Map(object).to_json().unwrap();
    assert_eq!(json["stringData"]["user"], "admin");
    assert_eq!(json["stringData"]["count"], 7);
    assert_eq!(json["metadata"]["namespace"], "elsewhere");
}

#[test]
fn a_reader_without_the_key_is_told_for_whom_the_file_is() {
    let mut other = Keys::new();
    other
        .add_age("AGE-SECRET-KEY-1GQ9778VQXMMJVE8SK7J6VT8UJ4HDQAJUVSFCWCM02D8GEWQ72PVQ2Y5J33")
        .unwrap();
    let error = decrypt(&data("all.yaml"), Format::Yaml, Format::Yaml, &other).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("none of the 1 age keys given opens it; it is encrypted for age1"),
        "{error}"
    );
}

#[test]
fn what_is_not_honoured_is_refused_by_name() {
    let text = String::from_utf8(data("all.yaml")).unwrap();
    let pgp = text.replacen("    age:\n", "    pgp:\n", 1);
    let error = decrypt(pgp.as_bytes(), Format::Yaml, Format::Yaml, &keys()).unwrap_err();
    assert!(
        error.to_string().contains("PGP keys are not supported"),
        "{error}"
    );

    let rule = text.replacen(
        "unencrypted_suffix: _unencrypted",
        "encrypted_comment_regex: secret",
        1,
    );
    let error = decrypt(rule.as_bytes(), Format::Yaml, Format::Yaml, &keys()).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("`encrypted_comment_regex` is not supported"),
        "{error}"
    );

    let plain = decrypt(b"a: 1\n", Format::Yaml, Format::Yaml, &keys());
    assert_eq!(plain, Err(Error::NotEncrypted));
}

#[test]
fn neither_keys_nor_values_appear_in_debug_output_or_errors() {
    let secret = "GQ9778VQXMMJVE8SK7J6VT8UJ4HDQAJUVSFCWCM02D8GEWQ72PVQ2Y5J33";
    let mut keys = keys();
    keys.add_age(&format!("AGE-SECRET-KEY-1{secret}")).unwrap();
    assert_eq!(format!("{keys:?}"), "Keys(2 age identities)");
    let mistyped = format!("AGE-SECRET-KEY-1{}", secret.replace("GQ", "QG"));
    let error = keys.add_age(&mistyped).unwrap_err();
    assert!(!error.to_string().contains("778VQ"));
}

/// The program, if it is installed.
fn sops() -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    let found = std::env::split_paths(&path)
        .map(|dir| dir.join("sops"))
        .find(|file| file.is_file());
    if found.is_none() {
        eprintln!("SKIPPED: sops is not here");
    }
    found
}

#[test]
fn what_sops_encrypts_now_is_decrypted_here() {
    let Some(sops) = sops() else { return };
    let recipient = String::from_utf8(data("key.txt")).unwrap();
    let recipient = recipient
        .lines()
        .find_map(|l| l.split("public key: ").nth(1))
        .unwrap();
    let dir = tempfile::tempdir().unwrap();
    let long = "x".repeat(200_000);
    let yaml = format!(
        "a: 0755\nb: 1.10\nc: 'yes'\nd: [1, [2, {{e: f}}], 2001-02-03]\ng:\n  h: \"\"\n  i: -0.5\n  j: 1e-9\nlong: {long}\nuni: \"é\\u2028\\n\"\nx_unencrypted: 3\n"
    );
    let cases: [(&str, &str, &[&str]); 5] = [
        ("a.yaml", &yaml, &[]),
        (
            "b.yaml",
            "data: {k: dg==}\nkind: Secret\nn: 5\n",
            &["--encrypted-regex", "^(data)$"],
        ),
        (
            "c.yaml",
            "data: {k: dg==}\nkind: Secret\n",
            &["--unencrypted-regex", "^kind$"],
        ),
        (
            "d.json",
            "{\"z\": [1, 2.50, {\"a\": false}], \"a\": \"<&>\"}",
            &[],
        ),
        (
            "e.yaml",
            "data: {k: dg==}\nkind: Secret\n",
            &["--encrypted-suffix", "ta"],
        ),
    ];
    for (name, text, options) in cases {
        let file = dir.path().join(name);
        std::fs::write(&file, text).unwrap();
        let output = Command::new(&sops)
            .args(["--encrypt", "--age", recipient])
            .args(options)
            .arg(&file)
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        let format = Format::of_path(name);
        let plain =
            decrypt(&output.stdout, format, format, &keys()).unwrap_or_else(|e| panic!("{name}: {e}"));
        // A date becomes a time in sops, which is all that its type says.
        let expected = text.replace("2001-02-03", "2001-02-03T00:00:00Z");
        assert_eq!(values(&plain), values(expected.as_bytes()), "{name}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn no_damage_to_a_file_makes_the_reader_panic_or_lie(at in 0_usize..4_000, byte in any::<u8>(), which in 0_usize..3) {
        let (name, format) = [("regex.yaml", Format::Yaml), ("values.env", Format::Dotenv), ("bytes.bin", Format::Binary)][which];
        let mut text = data(name);
        let at = at % text.len();
        let before = text[at];
        text[at] = byte;
        if let Ok(plain) = decrypt(&text, format, format, &keys()) {
            // What opens after a change has the same values: the change was in what nobody reads, or in the name of a
            // value that is not encrypted, which SOPS does not cover.
            let whole = decrypt(&data(name), format, format, &keys()).unwrap();
            let same = match format {
                Format::Yaml => leaves(&values(&plain).into()) == leaves(&values(&whole).into()),
                _ => plain == whole,
            };
            prop_assert!(same || before == byte, "byte {} became {}", at, byte);
        }
    }

    #[test]
    fn no_text_is_mistaken_for_an_age_key(text in "\\PC{0,80}") {
        let _ = Keys::new().add_age(&text);
        let key = format!("AGE-SECRET-KEY-1{text}");
        let refused = Keys::new().add_age(&key).is_err();
        prop_assert!(refused);
    }
}
