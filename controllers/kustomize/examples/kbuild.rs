//! Prints the build of a directory; for comparing with other tools by hand.
//! `kbuild [DIR] [--tree DIR] [--load-restrictor X] [--none] [--fifo] [--stats]`
//!
//! `kbuild --batch` reads absolute directories from standard input and answers each with one line of JSON (`out`, `err`):
//! what a program that compares thousands of builds with those of another tool talks to.

use serin_kustomize::{LoadRestrictor, Options, Reorder, build, dir::DirTree};

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let mut options = Options::default();
    let (mut tree, mut root, mut stats) = (".".to_owned(), None, false);
    let mut it = args.iter();
    while let Some(arg) = it.next() {
        match arg.as_str() {
            "--load-restrictor" => {
                options.load_restrictor = it.next().and_then(|v| v.parse().ok()).unwrap_or_default()
            }
            "--none" => options.load_restrictor = LoadRestrictor::None,
            "--fifo" => options.reorder = Reorder::None,
            "--stats" => stats = true,
            "--batch" => return batch(&options),
            "--tree" => tree = it.next().cloned().unwrap_or_default(),
            other => root = Some(other.to_owned()),
        }
    }
    let root = root.unwrap_or_default();
    let start = std::time::Instant::now();
    match build(&DirTree::new(&tree), &root, &options) {
        Ok(result) => {
            let built = start.elapsed();
            match result.to_yaml() {
                Ok(text) if !stats => print!("{text}"),
                Ok(text) => eprintln!(
                    "{:?} build {built:?} total {:?} bytes {}",
                    result.stats,
                    start.elapsed(),
                    text.len()
                ),
                Err(e) => {
                    eprintln!("Error: {e}");
                    std::process::exit(1);
                }
            }
        }
        Err(e) => {
            eprintln!("Error: {e}");
            std::process::exit(1);
        }
    }
}

fn batch(options: &Options<'_>) {
    for line in std::io::stdin().lines().map_while(Result::ok) {
        let root = line.trim_start_matches('/');
        let result = build(&DirTree::new("/"), root, options)
            .map_err(|e| e.to_string())
            .and_then(|built| built.to_yaml().map_err(|e| e.to_string()));
        let (out, err) = match result {
            Ok(text) => (text, String::new()),
            Err(e) => (String::new(), e),
        };
        println!("{}", serde_json::json!({ "out": out, "err": err }));
    }
}
