//! Writes the generated CustomResourceDefinitions to `crds/manifests/` and removes what is no longer generated.

use std::collections::BTreeSet;
use std::path::Path;

fn main() -> std::io::Result<()> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("manifests");
    std::fs::create_dir_all(&directory)?;
    let manifests = serin_crds::manifests();
    for (name, text) in &manifests {
        std::fs::write(directory.join(name), text)?;
    }
    let wanted: BTreeSet<&str> = manifests.iter().map(|(name, _)| name.as_str()).collect();
    for entry in std::fs::read_dir(&directory)? {
        let entry = entry?;
        if !wanted.contains(entry.file_name().to_string_lossy().as_ref()) {
            std::fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}
