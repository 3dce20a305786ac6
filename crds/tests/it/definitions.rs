//! The committed CustomResourceDefinitions are the generated ones.

use std::collections::BTreeMap;
use std::path::Path;

#[test]
fn committed_manifests_are_what_the_types_generate() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("manifests");
    let committed: BTreeMap<String, String> = std::fs::read_dir(&folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .map(|path| {
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            (name, std::fs::read_to_string(&path).unwrap())
        })
        .collect();
    let generated: BTreeMap<String, String> = serin_crds::manifests().into_iter().collect();
    let names = |files: &BTreeMap<String, String>| files.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&committed), names(&generated), "run `make crds`");
    for (name, text) in &generated {
        assert!(
            committed[name] == *text,
            "crds/manifests/{name} is out of date: run `make crds`"
        );
    }
}

#[test]
fn generated_yaml_reads_back_as_the_definition() {
    for (definition, (name, text)) in serin_crds::definitions().iter().zip(serin_crds::manifests()) {
        let read: serde_json::Value = serde_yaml::from_str(&text).unwrap();
        let mut expected = serde_json::to_value(definition).unwrap();
        expected.as_object_mut().unwrap().remove("status");
        assert_eq!(read, expected, "{name}");
    }
}
