//! The patches for other projects: that they only add lines, and that the script applies them to the right tree alone.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Where there are patches, if there are.
const FOR: [&str; 2] = ["drakvuf-patches", "smartvmi-patches"];

fn repo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The patches in a directory, by name.
fn patches(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut patches: Vec<_> = fs::read_dir(dir)?.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
    patches.retain(|path| path.extension().is_some_and(|extension| extension == "patch"));
    patches.sort();
    Ok(patches)
}

/// The lines of a list that are no comments.
fn list(file: &Path) -> Result<Vec<String>> {
    Ok(list_of(&fs::read_to_string(file)?))
}

fn list_of(text: &str) -> Vec<String> {
    text.lines().filter(|line| !line.is_empty() && !line.starts_with('#')).map(str::to_owned).collect()
}

/// Says what a patch may not have, and names the files it touches.
fn touched_by(patch: &str, problems: &mut Vec<String>) -> Vec<String> {
    let mut files = Vec::new();
    // Lines of the hunk at hand that are still to come.
    let mut left = 0;
    for line in patch.lines().skip_while(|line| !line.starts_with("diff --git ")) {
        if left > 0 {
            left -= 1;
            if !line.starts_with('+') {
                problems.push(format!("is not an added line: {line}"));
            }
        } else if let Some(hunk) = line.strip_prefix("@@ -") {
            let added = hunk.strip_suffix(" @@").and_then(|hunk| hunk.split_once(",0 +")).map(|(_, added)| added);
            match added.map(|added| added.split_once(',').map_or(Ok(1), |(_, count)| count.parse::<usize>())) {
                Some(Ok(count)) => left = count,
                _ => problems.push(format!("is not the head of a hunk that only adds: {line}")),
            }
        } else if let Some(file) = line.strip_prefix("+++ b/") {
            files.push(file.to_owned());
        } else if !["diff --git ", "index ", "new file mode ", "--- "].iter().any(|start| line.starts_with(start)) {
            problems.push(format!("is not of a patch that only adds: {line}"));
        }
    }
    files
}

#[test]
fn the_patches_only_add_lines() -> Result<()> {
    let mut problems = Vec::new();
    for dir in FOR.map(|dir| repo().join(dir)) {
        let patches = patches(&dir)?;
        if patches.is_empty() {
            continue;
        }
        let upstream = list(&dir.join("upstream"))?;
        let commit = upstream.iter().find_map(|line| line.strip_prefix("commit ")).ok_or("no commit in `upstream`")?;
        let mut touched = Vec::new();
        for patch in patches {
            let text = fs::read_to_string(&patch)?;
            assert!(text.contains(commit), "{} does not name the commit it is for", patch.display());
            touched.append(&mut touched_by(&text, &mut problems));
        }
        touched.sort();
        touched.dedup();
        let mut listed: Vec<_> =
            list(&dir.join("blobs"))?.iter().filter_map(|line| Some(line.split_once(' ')?.1.to_owned())).collect();
        listed.sort();
        assert_eq!(touched, listed, "`blobs` in {} lists what the patches touch", dir.display());
    }
    assert_eq!(problems, Vec::<String>::new());
    Ok(())
}

/// A small project, and two patches for it.
struct Fake {
    dir: PathBuf,
}

/// What git calls the contents of `one` and `dir/two` below.
const BLOBS: &str = "# A comment.\n\
    5626abf0f72e58d7a153368ba57db4c673c0e171 one\n\
    bff452f036590863e88c499fee8279f9074cc527 dir/two\n\
    new dir/three\n";
const UPSTREAM: &str = "# A comment.\nname Fake\ncommit 0123456789abcdef0123456789abcdef01234567\n";
const FIRST: &str = "Adds.\n\n\
    diff --git a/one b/one\nindex 1..2 100644\n--- a/one\n+++ b/one\n@@ -1,0 +2 @@\n+and a half\n";
const SECOND: &str = "Adds more.\n\n\
    diff --git a/dir/three b/dir/three\nnew file mode 100644\nindex 0..1\n--- /dev/null\n+++ b/dir/three\n\
    @@ -0,0 +1,2 @@\n+3\n+3\n\
    diff --git a/dir/two b/dir/two\nindex 1..2 100644\n--- a/dir/two\n+++ b/dir/two\n@@ -0,0 +1 @@\n+before two\n\
    diff --git a/one b/one\nindex 2..3 100644\n--- a/one\n+++ b/one\n@@ -2,0 +3,2 @@\n+and\n+more\n";
/// To what the first two have added.
const THIRD: &str = "Adds to that.\n\n\
    diff --git a/dir/three b/dir/three\nindex 1..2 100644\n--- a/dir/three\n+++ b/dir/three\n@@ -1,0 +2 @@\n+3 and a half\n\
    diff --git a/one b/one\nindex 3..4 100644\n--- a/one\n+++ b/one\n@@ -4,0 +5 @@\n+and more\n";

impl Fake {
    fn new(name: &str) -> Result<Self> {
        let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("patches-{name}"));
        if dir.exists() {
            fs::remove_dir_all(&dir)?;
        }
        let fake = Self { dir };
        fs::create_dir_all(fake.tree().join("dir"))?;
        fs::create_dir_all(fake.dir.join("patches"))?;
        fs::copy(repo().join("cpp-shim/patches/apply.sh"), fake.dir.join("patches/apply.sh"))?;
        fake.patch("upstream", UPSTREAM)?;
        fake.patch("blobs", BLOBS)?;
        fake.patch("1.patch", FIRST)?;
        fake.patch("2.patch", SECOND)?;
        fake.patch("3.patch", THIRD)?;
        fs::write(fake.tree().join("one"), "one\n")?;
        fs::write(fake.tree().join("dir/two"), "2\ntwo\n")?;
        Ok(fake)
    }

    fn tree(&self) -> PathBuf {
        self.dir.join("a tree")
    }

    /// A file beside the script.
    fn patch(&self, name: &str, contents: &str) -> Result<()> {
        Ok(fs::write(self.dir.join("patches").join(name), contents)?)
    }

    fn git(&self, dir: &Path, arguments: &[&str]) -> Result<()> {
        let done = Command::new("git").args(arguments).current_dir(dir).output()?;
        assert!(done.status.success(), "git {arguments:?}: {}", String::from_utf8_lossy(&done.stderr));
        Ok(())
    }

    fn apply(&self, arguments: &[&str]) -> Result<Output> {
        let script = self.dir.join("patches/apply.sh");
        Ok(Command::new("sh").arg(script).args(arguments).arg(self.tree()).output()?)
    }

    /// The script with a program of its own replaced: `body` is run at its calls that match `pattern`, and knows their
    /// number as `$n`.
    fn apply_with(&self, program: &str, pattern: &str, body: &str, arguments: &[&str]) -> Result<Output> {
        let bin = self.dir.join("bin");
        if bin.exists() {
            fs::remove_dir_all(&bin)?;
        }
        fs::create_dir(&bin)?;
        let script = format!(
            "#!/bin/sh\ncase \"$*\" in {pattern})\n echo >>\"$0.calls\"; n=$(wc -l <\"$0.calls\")\n {body}\nesac\n\
             PATH=${{PATH#*:}} exec {program} \"$@\"\n"
        );
        fs::write(bin.join(program), script)?;
        fs::set_permissions(bin.join(program), fs::Permissions::from_mode(0o755))?;
        let path = format!("{}:{}", bin.display(), std::env::var("PATH")?);
        let script = self.dir.join("patches/apply.sh");
        Ok(Command::new("sh").arg(script).args(arguments).arg(self.tree()).env("PATH", path).output()?)
    }

    /// Whether the script's own directory is gone from the tree.
    fn is_clean(&self) -> bool {
        !self.tree().join(".hyperbp-patches").exists()
    }

    fn succeeds(&self, arguments: &[&str]) -> Result<()> {
        let done = self.apply(arguments)?;
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        Ok(())
    }

    /// Refuses, says each of `words`, and changes nothing.
    fn refuses(&self, arguments: &[&str], words: &[&str]) -> Result<()> {
        let before = self.contents()?;
        let done = self.apply(arguments)?;
        let said = String::from_utf8_lossy(&done.stderr);
        assert_eq!(done.status.code(), Some(1), "{said}");
        for word in words {
            assert!(said.contains(word), "`{word}` is missing: {said}");
        }
        assert_eq!(self.contents()?, before);
        Ok(())
    }

    /// A run that was stopped is undone first; then there is nothing to take out.
    fn refuses_to_revert_what_was_stopped(&self) -> Result<()> {
        let done = self.apply(&["--revert"])?;
        assert_eq!(done.status.code(), Some(1));
        assert!(String::from_utf8_lossy(&done.stdout).contains("was stopped"));
        Ok(())
    }

    /// The files of the tree that matter here, `None` where there is none.
    fn contents(&self) -> Result<[Option<String>; 3]> {
        let read = |name: &str| {
            let path = self.tree().join(name);
            path.exists().then(|| fs::read_to_string(path)).transpose()
        };
        Ok([read("one")?, read("dir/two")?, read("dir/three")?])
    }

    fn is_original(&self) -> Result<bool> {
        Ok(self.contents()? == [Some("one\n".to_owned()), Some("2\ntwo\n".to_owned()), None])
    }

    fn is_patched(&self) -> Result<bool> {
        let texts = ["one\nand a half\nand\nmore\nand more\n", "before two\n2\ntwo\n", "3\n3 and a half\n3\n"];
        Ok(self.contents()? == texts.map(|text| Some(text.to_owned())))
    }
}

#[test]
fn a_tree_is_patched_and_reverted() -> Result<()> {
    // The target directory lies in our own repository, so this is an export in another repository.
    let fake = Fake::new("export")?;
    fake.succeeds(&["--check"])?;
    assert!(fake.is_original()?);
    fake.succeeds(&[])?;
    assert!(fake.is_patched()?);
    fake.refuses(&[], &["already", "--revert"])?;
    fake.succeeds(&["--revert"])?;
    assert!(fake.is_original()?);
    fake.refuses(&["--revert"], &["does not have these patches"])
}

#[test]
fn a_checkout_is_patched_whatever_is_configured() -> Result<()> {
    let fake = Fake::new("checkout")?;
    let tree = fake.tree();
    fake.git(&tree, &["init", "--quiet"])?;
    for (key, value) in [
        ("core.autocrlf", "true"),
        ("apply.whitespace", "error"),
        ("apply.ignoreWhitespace", "change"),
        ("core.safecrlf", "true"),
    ] {
        fake.git(&tree, &["config", key, value])?;
    }
    fake.succeeds(&[])?;
    assert!(fake.is_patched()?);
    fake.succeeds(&["--revert"])?;
    assert!(fake.is_original()?);
    Ok(())
}

#[test]
fn another_tree_is_refused_by_name() -> Result<()> {
    let fake = Fake::new("changed")?;
    fs::write(fake.tree().join("dir/two"), "2\nTWO\n")?;
    let commit = "0123456789abcdef0123456789abcdef01234567";
    fake.refuses(&[], &["dir/two: is ", "expected bff452f036590863e88c499fee8279f9074cc527", "Fake", commit])?;
    fs::remove_file(fake.tree().join("one"))?;
    fake.refuses(&[], &["one: is missing", "dir/two: is "])?;
    fake.refuses(&["--check"], &["one: is missing"])?;

    let fake = Fake::new("more")?;
    fs::write(fake.tree().join("dir/three"), "of somebody else")?;
    fake.refuses(&[], &["dir/three: is there"])
}

#[test]
fn one_patch_that_does_not_apply_stops_all() -> Result<()> {
    let fake = Fake::new("atomic")?;
    fake.patch("3.patch", &FIRST.replace("one", "nowhere"))?;
    fake.refuses(&[], &["nothing was changed"])?;
    assert!(fake.is_original()?);
    Ok(())
}

/// Whatever fails in the middle, and at whatever call: the tree is as it was, and takes the same again.
#[test]
fn a_failure_in_the_middle_changes_nothing() -> Result<()> {
    let applies = "*--check*) ;; *apply*";
    for (program, pattern) in [("git", applies), ("mv", "*"), ("cp", "*")] {
        for call in 1..=3 {
            let fake = Fake::new("failure")?;
            let fail = format!("[ $n -ne {call} ] || {{ echo broken >&2; exit 1; }}");
            let done = fake.apply_with(program, pattern, &fail, &[])?;
            let said = String::from_utf8_lossy(&done.stderr);
            assert_eq!(done.status.code(), Some(1), "{program} {call}: {said}");
            assert!(said.contains("as it was"), "{program} {call}: {said}");
            assert!(fake.is_original()? && fake.is_clean(), "{program} {call}: {:?}", fake.contents()?);
            fake.succeeds(&[])?;
            assert!(fake.is_patched()?);

            let done = fake.apply_with(program, pattern, &fail, &["--revert"])?;
            // Two files are moved then, the third one goes.
            if (program, call) != ("mv", 3) {
                assert_eq!(done.status.code(), Some(1), "{program} {call}, reverting");
                assert!(fake.is_patched()? && fake.is_clean(), "{program} {call}, reverting: {:?}", fake.contents()?);
                fake.succeeds(&["--revert"])?;
            }
            assert!(fake.is_original()? && fake.is_clean());
        }
    }
    Ok(())
}

#[test]
fn a_script_that_was_killed_in_the_middle_is_undone_by_the_next() -> Result<()> {
    for (program, call) in [("cp", 2), ("mv", 1), ("mv", 2), ("mv", 3)] {
        let fake = Fake::new("killed")?;
        let kill = format!("[ $n -ne {call} ] || kill -9 \"$(cat '{}/.hyperbp-patches/pid')\"", fake.tree().display());
        let done = fake.apply_with(program, "*", &kill, &[])?;
        assert_eq!(done.status.code(), None, "{program} {call}: {}", String::from_utf8_lossy(&done.stderr));
        assert!(!fake.is_clean());
        fake.refuses(&["--check"], &["stopped", "without --check"])?;
        fake.refuses_to_revert_what_was_stopped()?;
        assert!(fake.is_original()? && fake.is_clean());
        fake.succeeds(&[])?;
        assert!(fake.is_patched()?);
    }
    // It is still at work.
    let fake = Fake::new("working")?;
    fs::create_dir(fake.tree().join(".hyperbp-patches"))?;
    fs::write(fake.tree().join(".hyperbp-patches/pid"), format!("{}\n", std::process::id()))?;
    fake.refuses(&[], &["at work"])
}

/// `cd` goes by CDPATH, and takes a dash for something else.
#[test]
fn the_tree_is_found_whatever_its_name_and_the_environment() -> Result<()> {
    let fake = Fake::new("names")?;
    fs::create_dir_all(fake.dir.join("elsewhere/patches"))?;
    fs::create_dir_all(fake.dir.join("elsewhere/a tree"))?;
    let run = |arguments: &[&str], variables: &[(&str, PathBuf)]| {
        let mut command = Command::new("sh");
        command.arg("patches/apply.sh").args(arguments).current_dir(&fake.dir);
        command.envs(variables.iter().map(|(name, value)| (name, value))).output()
    };
    let done = run(&["a tree"], &[("CDPATH", fake.dir.join("elsewhere"))])?;
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    assert!(fake.is_patched()?);
    fake.succeeds(&["--revert"])?;

    for name in ["-x", "-", "a:b"] {
        let tree = fake.dir.join(name);
        fs::rename(fake.tree(), &tree)?;
        let done = run(&["--", name], &[("OLDPWD", fake.dir.join("elsewhere"))])?;
        assert!(done.status.success(), "{name}: {}", String::from_utf8_lossy(&done.stderr));
        fs::rename(&tree, fake.tree())?;
        assert!(fake.is_patched()?, "{name}");
        fake.succeeds(&["--revert"])?;
    }
    // git takes a list of directories that ends with colons, and our own repository is above these.
    let (within, script) = (fake.dir.join("a:b"), fake.dir.join("patches/apply.sh"));
    fs::create_dir(&within)?;
    fs::rename(fake.tree(), within.join("tree"))?;
    let done = Command::new("sh").arg(script).arg(within.join("tree")).output()?;
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    fs::rename(within.join("tree"), fake.tree())?;
    assert!(fake.is_patched()?);
    Ok(())
}

#[test]
fn nothing_is_reverted_if_a_line_of_the_patches_was_changed() -> Result<()> {
    let fake = Fake::new("edited")?;
    fake.succeeds(&[])?;
    fs::write(fake.tree().join("dir/three"), "3\n4\n")?;
    fake.refuses(&["--revert"], &["have been changed"])?;
    fake.refuses(&[], &["dir/three: is there"])
}

#[test]
fn what_lies_beside_the_script_must_be_there() -> Result<()> {
    for file in ["blobs", "upstream"] {
        let fake = Fake::new(&format!("no-{file}"))?;
        fs::remove_file(fake.dir.join("patches").join(file))?;
        fake.refuses(&[], &[file])?;
    }
    let fake = Fake::new("no-patch")?;
    for patch in patches(&fake.dir.join("patches"))? {
        fs::remove_file(patch)?;
    }
    fake.refuses(&[], &["no patch"])
}

#[test]
fn what_is_generated_can_be_applied() -> Result<()> {
    let fake = Fake::new("regenerate")?;
    let (tree, patches_dir) = (fake.tree(), fake.dir.join("patches"));
    fs::copy(repo().join("cpp-shim/patches/regenerate.sh"), patches_dir.join("regenerate.sh"))?;
    let commit = |message: &str| -> Result<()> {
        fake.git(&tree, &["add", "."])?;
        let who = ["-c", "user.name=nobody", "-c", "user.email=nobody", "-c", "commit.gpgSign=false"];
        fake.git(&tree, &[&who, &["commit", "--quiet", "--message", message][..]].concat())
    };
    let regenerate = || Command::new("sh").arg(patches_dir.join("regenerate.sh")).arg(&tree).output();

    fake.git(&tree, &["init", "--quiet"])?;
    commit("What is there")?;
    let head = Command::new("git").args(["rev-parse", "HEAD"]).current_dir(&tree).output()?;
    let upstream = String::from_utf8(head.stdout)?;
    fake.patch("upstream", &format!("name Fake\ncommit {upstream}"))?;
    fs::write(tree.join("one"), "one\nand a half\n")?;
    commit("A half: after one\n\nThe message's body.")?;
    fs::write(tree.join("one"), "one\nand a half\nand\nmore\n")?;
    fs::write(tree.join("dir/two"), "before two\n2\ntwo\n")?;
    fs::write(tree.join("dir/three"), "3\n3\n")?;
    commit("More")?;
    fs::write(tree.join("one"), "one\nand a half\nand\nmore\nand more\n")?;
    fs::write(tree.join("dir/three"), "3\n3 and a half\n3\n")?;
    commit("To that")?;
    let done = regenerate()?;
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));

    let names: Vec<_> = patches(&patches_dir)?.iter().map(|path| path.file_name().map(ToOwned::to_owned)).collect();
    assert_eq!(names, ["0001-a-half.patch", "0002-more.patch", "0003-to-that.patch"].map(|name| Some(name.into())));
    let first = fs::read_to_string(patches_dir.join("0001-a-half.patch"))?;
    assert!(first.starts_with("A half: after one\n\nThe message's body.\n") && first.contains(upstream.trim()));
    let mut problems = Vec::new();
    touched_by(&first, &mut problems);
    assert_eq!(problems, Vec::<String>::new());
    assert_eq!(list(&patches_dir.join("blobs"))?.len(), list_of(BLOBS).len());

    fake.git(&tree, &["checkout", "--quiet", upstream.trim()])?;
    assert!(fake.is_original()?);
    fake.succeeds(&[])?;
    assert!(fake.is_patched()?);

    fs::write(tree.join("one"), "1\n")?;
    commit("Changes a line")?;
    let done = regenerate()?;
    assert_eq!(done.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&done.stderr).contains("one"));
    assert_eq!(patches(&patches_dir)?.len(), 3);
    Ok(())
}

#[test]
fn each_project_has_the_script() -> Result<()> {
    for dir in FOR.map(|dir| repo().join(dir)) {
        let help = Command::new("sh").arg(dir.join("apply.sh")).arg("--help").output()?;
        let said = String::from_utf8_lossy(&help.stdout);
        for line in list(&dir.join("upstream"))? {
            let (_, word) = line.split_once(' ').ok_or("a key alone in `upstream`")?;
            assert!(said.contains(word), "{} does not name {word}: {said}", dir.display());
        }
    }
    Ok(())
}

#[test]
fn the_usage_is_told() -> Result<()> {
    let fake = Fake::new("usage")?;
    let script = fake.dir.join("patches/apply.sh");
    let run = |arguments: &[&str]| Command::new("sh").arg(&script).args(arguments).output();
    let help = run(&["--help"])?;
    assert!(help.status.success());
    assert!(String::from_utf8_lossy(&help.stdout).contains("--revert"));
    assert_eq!(run(&[])?.status.code(), Some(2));
    assert_eq!(run(&["one", "two"])?.status.code(), Some(2));
    assert_eq!(run(&["--force", "one"])?.status.code(), Some(2));
    assert_eq!(run(&["nowhere"])?.status.code(), Some(1));
    Ok(())
}
