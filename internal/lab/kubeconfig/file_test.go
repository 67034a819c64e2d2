package kubeconfig

import (
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
)

const mine = "# mine\napiVersion: v1\nkind: Config\nclusters:\n- {name: prod, cluster: {server: https://prod}}\ncurrent-context: prod # careful\n"

// write makes a kubeconfig for a test, in a directory of its own.
func someFile(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "config")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func put(t *testing.T, lab string, files ...string) {
	t.Helper()
	if err := Put(files, lab, entries(lab)); err != nil {
		t.Fatal(err)
	}
}

func take(t *testing.T, path, lab string) {
	t.Helper()
	if err := Take(path, lab); err != nil {
		t.Fatal(err)
	}
}

func wantText(t *testing.T, path, want string) {
	t.Helper()
	if data, err := os.ReadFile(path); err != nil || string(data) != want {
		t.Errorf("%s is %q (%v), want %q", path, data, err, want)
	}
}

// wantOnly looks for what is left in a directory: locks, temporary files.
func wantOnly(t *testing.T, dir string, want ...string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var have []string
	for _, e := range entries {
		have = append(have, e.Name())
	}
	if strings.Join(have, " ") != strings.Join(want, " ") {
		t.Errorf("%s holds %v, want %v", dir, have, want)
	}
}

func TestOwnerModeAndAttributesStay(t *testing.T) {
	path := someFile(t, mine)
	if err := os.Chmod(path, 0o640); err != nil {
		t.Fatal(err)
	}
	root := os.Geteuid() == 0
	if root {
		if err := os.Chown(path, 1000, 1001); err != nil {
			t.Fatal(err)
		}
	}
	attributes := unix.Setxattr(path, "user.note", []byte("x"), 0) == nil
	for _, step := range []func(){func() { put(t, "a", path) }, func() { take(t, path, "a") }} {
		step()
		var st unix.Stat_t
		if err := unix.Stat(path, &st); err != nil || st.Mode&0o777 != 0o640 || root && (st.Uid != 1000 || st.Gid != 1001) {
			t.Errorf("mode %o, owner %d:%d (%v), want 640 and 1000:1001", st.Mode&0o777, st.Uid, st.Gid, err)
		}
		if n, err := unix.Getxattr(path, "user.note", make([]byte, 8)); attributes && n != 1 {
			t.Errorf("the extended attribute is lost: %v", err)
		}
	}
	wantText(t, path, mine)
	wantOnly(t, filepath.Dir(path), "config")
}

func TestFileThatWasNotThere(t *testing.T) {
	home := t.TempDir()
	if os.Geteuid() == 0 {
		if err := os.Chown(home, 1000, 1001); err != nil {
			t.Fatal(err)
		}
	}
	dir := filepath.Join(home, "a", ".kube")
	path := filepath.Join(dir, "config")
	put(t, "a", path)
	for p, mode := range map[string]uint32{path: 0o600, dir: 0o700, filepath.Dir(dir): 0o700} {
		var st unix.Stat_t
		if err := unix.Stat(p, &st); err != nil || st.Mode&0o777 != mode || os.Geteuid() == 0 && (st.Uid != 1000 || st.Gid != 1001) {
			t.Errorf("%s: mode %o, owner %d:%d (%v), want %o and the home's owner", p, st.Mode&0o777, st.Uid, st.Gid, err, mode)
		}
	}
	put(t, "b", path)
	take(t, path, "a")
	check(t, readAll(t, path), "b", true)
	take(t, path, "b")
	wantOnly(t, home)

	// A directory that was there, if only an empty one, stays.
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	put(t, "a", path)
	take(t, path, "a")
	wantOnly(t, dir)

	// So does an empty file.
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	put(t, "a", path)
	take(t, path, "a")
	wantText(t, path, "")
}

// TestDirectoryOfAllUsers: under sudo, a file in /tmp is to be of use to who called it.
func TestDirectoryOfAllUsers(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o777|fs.ModeSticky); err != nil {
		t.Fatal(err)
	}
	t.Setenv("SUDO_UID", "1000")
	t.Setenv("SUDO_GID", "1001")
	path := filepath.Join(dir, "config")
	put(t, "a", path)
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil || st.Uid != 1000 || st.Gid != 1001 {
		t.Errorf("its owner is %d:%d (%v), want 1000:1001", st.Uid, st.Gid, err)
	}
}

func readAll(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func TestLinks(t *testing.T) {
	dir := t.TempDir()
	target, link := filepath.Join(dir, "settings", "real"), filepath.Join(dir, "config")
	for from, to := range map[string]string{link: "middle", filepath.Join(dir, "middle"): target} {
		if err := os.Symlink(to, from); err != nil {
			t.Fatal(err)
		}
	}
	wantLink := func() {
		t.Helper()
		if to, err := os.Readlink(link); err != nil || to != "middle" {
			t.Errorf("the link leads to %q: %v", to, err)
		}
	}
	// It leads nowhere.
	put(t, "a", link)
	wantLink()
	check(t, readAll(t, target), "a", true)
	take(t, link, "a")
	wantLink()
	wantOnly(t, dir, "config", "middle")
	// It leads to a file.
	if err := os.Mkdir(filepath.Dir(target), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(target, []byte(mine), 0o600); err != nil {
		t.Fatal(err)
	}
	put(t, "a", link)
	check(t, readAll(t, target), "a", true)
	take(t, link, "a")
	wantLink()
	wantText(t, target, mine)
	wantOnly(t, filepath.Dir(target), "real")
	// It leads to itself.
	loop := filepath.Join(dir, "loop")
	if err := os.Symlink("loop", loop); err != nil {
		t.Fatal(err)
	}
	if err := Put([]string{loop}, "a", entries("a")); !IsUneditable(err) {
		t.Errorf("got %v, want an UneditableError", err)
	}
}

func TestRefused(t *testing.T) {
	for name, text := range map[string]string{
		"damaged":           "clusters: [}\n",
		"a list":            "- a\n",
		"a word":            "hello\n",
		"two keys":          "clusters: []\nclusters: []\n",
		"a word for a list": "clusters: none\n",
		"an alias":          "x: &x []\nclusters: *x\n",
		"a merge":           "x: &x {clusters: [{name: a, cluster: {server: b}}]}\n<<: *x\n",
		"anchored context":  "current-context: &c prod\nx: *c\n",
		"block scalar":      "current-context: |-\n  prod\n",
		"complex key":       "? clusters\n: - {name: a, cluster: {server: b}}\n",
		"not UTF-8":         "kind: Config # \xff\n",
		"UTF-16":            "\xff\xfek\x00:\x00 \x001\x00",
		"second document":   "---\n---\nkind: Config\n",
		"own line":          "clusters:\n  []\n",
		"damaged record":    "extensions: [{name: fathom.network/undo, extension: 7}]\n",
	} {
		t.Run(name, func(t *testing.T) {
			path := someFile(t, text)
			if err := Check([]string{path}, "a", []string{"a-east"}); err == nil {
				t.Error("Check has nothing against it")
			}
			err := Put([]string{path}, "a", entries("a"))
			if err == nil {
				t.Errorf("it became %s", readAll(t, path))
			}
			t.Log(err)
			wantText(t, path, text)
			if err := Take(path, "a"); err != nil {
				t.Errorf("nothing is to be taken out of it, but: %v", err)
			}
			wantOnly(t, filepath.Dir(path), "config")
		})
	}
}

func TestNamesThatAreTaken(t *testing.T) {
	for _, kind := range kinds {
		text := kind.list + ":\n- name: a-west\n  " + kind.item + ": {}\n"
		path := someFile(t, text)
		err := Put([]string{path}, "a", entries("a"))
		if !IsTaken(err) || !strings.Contains(err.Error(), kind.item+` "a-west"`) {
			t.Errorf("got %v, want a TakenError about the %s", err, kind.item)
		}
		wantText(t, path, text)
		// It would be hidden in a file behind.
		first := someFile(t, mine)
		if err := Put([]string{first, path}, "a", entries("a")); !IsTaken(err) {
			t.Errorf("got %v, want a TakenError", err)
		}
		if err := Check([]string{first, path}, "a", []string{"a-west"}); !IsTaken(err) {
			t.Errorf("got %v, want a TakenError", err)
		}
		wantText(t, first, mine)
	}
	// The name of an entry that another lab has made is taken, too, and down of the one leaves the other.
	path := someFile(t, "")
	put(t, "a", path)
	if err := Put([]string{path}, "b", entries("a")); !IsTaken(err) {
		t.Errorf("got %v, want a TakenError", err)
	}
	take(t, path, "b")
	check(t, readAll(t, path), "a", true)
}

func TestSeveralFiles(t *testing.T) {
	dir := t.TempDir()
	a, b, c := filepath.Join(dir, "a"), filepath.Join(dir, "b"), filepath.Join(dir, "c")
	put(t, "a", a, b) // none is there: the last is made
	wantOnly(t, dir, "b")
	if err := os.WriteFile(c, []byte(mine), 0o600); err != nil {
		t.Fatal(err)
	}
	put(t, "a", a, c, b) // the first that is there; and it leaves the other
	wantOnly(t, dir, "c")
	check(t, readAll(t, c), "a", true)

	t.Setenv("HOME", dir)
	for env, want := range map[string]string{"": filepath.Join(dir, ".kube", "config"), ":" + a + "::" + b + ":" + a: a + " " + b} {
		t.Setenv("KUBECONFIG", env)
		if got := strings.Join(Files(), " "); got != want {
			t.Errorf("KUBECONFIG=%s: files are %s, want %s", env, got, want)
		}
	}
}

// TestKubectlBetween has `kubectl config` write the file anew, which loses comments and layout, not extensions.
func TestKubectlBetween(t *testing.T) {
	path := someFile(t, mine)
	put(t, "a", path)
	modify := func(change func(*clientcmdapi.Config)) {
		t.Helper()
		access := &clientcmd.PathOptions{GlobalFile: path, LoadingRules: &clientcmd.ClientConfigLoadingRules{ExplicitPath: path}}
		conf, err := access.GetStartingConfig()
		if err != nil {
			t.Fatal(err)
		}
		change(conf)
		if err := clientcmd.ModifyConfig(access, *conf, false); err != nil {
			t.Fatal(err)
		}
	}
	modify(func(c *clientcmdapi.Config) { c.Contexts["a-east"].Namespace = "shop" })
	put(t, "a", path) // and what the user added to a context stays
	put(t, "b", path)
	modify(func(c *clientcmdapi.Config) {
		if c.Contexts["a-east"].Namespace != "shop" {
			t.Errorf("the namespace is lost: %v", c.Contexts["a-east"])
		}
		c.Contexts["renamed"] = c.Contexts["a-west"]
		delete(c.Contexts, "a-west")
		c.Contexts["mine"] = &clientcmdapi.Context{Cluster: "a-west", AuthInfo: "a-west"}
	})
	take(t, path, "a")
	take(t, path, "b")
	conf, err := clientcmd.LoadFromFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if conf.CurrentContext != "prod" || len(conf.Clusters) != 1 || len(conf.AuthInfos) != 0 || len(conf.Contexts) != 1 || conf.Contexts["mine"] == nil || len(conf.Extensions) != 0 {
		t.Errorf("it is\n%s", readAll(t, path))
	}

	// A file that up made goes, although kubectl has written it since.
	made := filepath.Join(t.TempDir(), "dir", "config")
	path = made
	put(t, "a", path)
	modify(func(c *clientcmdapi.Config) { c.Contexts["a-east"].Namespace = "shop" })
	take(t, path, "a")
	if _, err := os.Stat(filepath.Dir(path)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("it is there: %v\n%s", err, readAll(t, path))
	}
	// ... but not if the user has put something into it.
	put(t, "a", path)
	modify(func(c *clientcmdapi.Config) { c.Clusters["prod"] = &clientcmdapi.Cluster{Server: "https://prod"} })
	take(t, path, "a")
	if conf, err = clientcmd.LoadFromFile(path); err != nil || len(conf.Clusters) != 1 || conf.CurrentContext != "" {
		t.Errorf("%v: it is\n%s", err, readAll(t, path))
	}
}

func TestEditedBetween(t *testing.T) {
	path := someFile(t, mine)
	put(t, "a", path)
	edited := strings.Replace(readAll(t, path), "- {name: prod", "# a new one\n- {name: new, cluster: {server: https://new}}\n\n- {name: prod", 1)
	edited = strings.Replace(edited, "current-context: a-east", "current-context: 'new'", 1) + "\n# more\nx: 1\n"
	if err := os.WriteFile(path, []byte(edited), 0o600); err != nil {
		t.Fatal(err)
	}
	take(t, path, "a")
	want := strings.Replace(mine, "- {name: prod", "# a new one\n- {name: new, cluster: {server: https://new}}\n\n- {name: prod", 1)
	wantText(t, path, strings.Replace(want, "current-context: prod", "current-context: 'new'", 1)+"\n# more\nx: 1\n")
}

// TestContextsOfOlderVersions takes out what was written when only contexts were marked.
func TestContextsOfOlderVersions(t *testing.T) {
	path := someFile(t, `apiVersion: v1
kind: Config
clusters:
- cluster: {server: https://a}
  name: a-east
- cluster: {server: https://prod}
  name: prod
contexts:
- context:
    cluster: a-east
    extensions:
    - extension: a
      name: fathom.network/lab
    user: a-east
  name: a-east
current-context: a-east
users:
- name: a-east
  user: {token: x}
`)
	take(t, path, "a")
	wantText(t, path, "apiVersion: v1\nkind: Config\nclusters:\n- cluster: {server: https://prod}\n  name: prod\ncontexts: []\ncurrent-context: \"\"\nusers: []\n")
}

func TestLocks(t *testing.T) {
	defer func(d time.Duration) { patience = d }(patience)
	patience = 50 * time.Millisecond
	path := someFile(t, mine)
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(path, link); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{path + ".lock", link + ".lock"} {
		// As kubectl makes it: empty, and nobody may read it.
		f, err := os.OpenFile(name, os.O_CREATE|os.O_EXCL, 0)
		if err != nil {
			t.Fatal(err)
		}
		f.Close()
		err = Put([]string{link}, "a", entries("a"))
		if !IsLocked(err) || !strings.Contains(err.Error(), "remove "+name) {
			t.Errorf("got %v, want a LockedError that names the file", err)
		}
		wantText(t, path, mine)
		// Who has it ends in time.
		patience = time.Minute
		removed := time.AfterFunc(10*time.Millisecond, func() { os.Remove(name) })
		put(t, "a", link)
		take(t, link, "a")
		removed.Stop()
		patience = 50 * time.Millisecond
	}
	// kubectl meets ours.
	unlock, err := lock(link, path)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{path, link} {
		access := &clientcmd.PathOptions{GlobalFile: p, LoadingRules: &clientcmd.ClientConfigLoadingRules{ExplicitPath: p}}
		if err := clientcmd.ModifyConfig(access, *clientcmdapi.NewConfig(), false); !errors.Is(err, fs.ErrExist) {
			t.Errorf("kubectl changed a locked file: %v", err)
		}
	}
	if err := Put([]string{path}, "a", entries("a")); !IsLocked(err) {
		t.Errorf("got %v, want a LockedError", err)
	}
	unlock()
	wantOnly(t, filepath.Dir(path), "config")
	wantOnly(t, filepath.Dir(link), "link")
}

// TestKilled has a process end while it has the lock and a half-written file. The next command goes on from there.
func TestKilled(t *testing.T) {
	path := os.Getenv("KUBECONFIG_TO_LOCK")
	if path != "" {
		if _, err := lock(path, path); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(temporary(path), []byte("key"), 0o600); err != nil {
			t.Fatal(err)
		}
		_ = unix.Kill(os.Getpid(), unix.SIGKILL)
		select {}
	}
	path = someFile(t, mine)
	kill := func() {
		t.Helper()
		cmd := exec.Command(os.Args[0], "-test.run=^TestKilled$")
		cmd.Env = append(os.Environ(), "KUBECONFIG_TO_LOCK="+path)
		if err := cmd.Run(); err == nil || !strings.Contains(err.Error(), "killed") {
			t.Fatalf("the process was not killed: %v", err)
		}
		wantOnly(t, filepath.Dir(path), ".config.fathom", "config", "config.lock")
	}
	kill()
	take(t, path, "a") // even when there is nothing else to do
	wantOnly(t, filepath.Dir(path), "config")
	kill()
	put(t, "a", path)
	wantOnly(t, filepath.Dir(path), "config")
	take(t, path, "a")
	wantText(t, path, mine)
}

func TestManyAtOnce(t *testing.T) {
	path := someFile(t, mine)
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			lab := "l" + strconv.Itoa(i)
			if err := Put([]string{path}, lab, entries(lab)); err != nil {
				t.Error(err)
			}
			if i%2 == 0 {
				if err := Take(path, lab); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	for i := range 8 {
		take(t, path, "l"+strconv.Itoa(i))
	}
	wantText(t, path, mine)
	wantOnly(t, filepath.Dir(path), "config")
}

func TestWhatIsNoFile(t *testing.T) {
	if err := Check([]string{os.DevNull}, "a", []string{"a-east"}); err != nil {
		t.Error(err)
	}
	put(t, "a", os.DevNull)
	take(t, os.DevNull, "a")
	if st, err := os.Stat(os.DevNull); err != nil || st.Mode()&fs.ModeCharDevice == 0 {
		t.Fatalf("/dev/null is %v: %v", st, err)
	}
	dir := t.TempDir()
	fifo := filepath.Join(dir, "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	linked := someFile(t, mine)
	if err := os.Link(linked, filepath.Join(dir, "other")); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{dir, fifo, linked} {
		if err := Put([]string{path}, "a", entries("a")); !IsUneditable(err) {
			t.Errorf("%s: got %v, want an UneditableError", path, err)
		}
		take(t, path, "a")
	}
	wantText(t, linked, mine)
}

func TestSecretsAreTheirOwnersAlone(t *testing.T) {
	path := someFile(t, "old")
	if err := os.Chmod(path, 0o644); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(path, link); err != nil {
		t.Fatal(err)
	}
	old, err := os.Open(path) // by somebody who could read it
	if err != nil {
		t.Fatal(err)
	}
	defer old.Close()
	fresh := filepath.Join(t.TempDir(), "fresh")
	for _, p := range []string{link, fresh} {
		if err := WriteSecret(p, []byte("key")); err != nil {
			t.Fatal(err)
		}
		wantText(t, p, "key")
		if st, err := os.Stat(p); err != nil || st.Mode().Perm() != 0o600 {
			t.Errorf("mode is %v (%v), want 0600", st.Mode(), err)
		}
	}
	if st, err := os.Lstat(link); err != nil || st.Mode()&fs.ModeSymlink == 0 {
		t.Errorf("the link is gone: %v", err)
	}
	text := make([]byte, 9)
	if n, _ := old.Read(text); string(text[:n]) != "old" {
		t.Errorf("who had the old file open reads %q", text[:n])
	}
	if err := WriteSecret(os.DevNull, []byte("key")); err != nil {
		t.Error(err)
	}
	if st, err := os.Stat(os.DevNull); err != nil || st.Mode()&fs.ModeCharDevice == 0 {
		t.Fatalf("/dev/null is %v: %v", st, err)
	}
}
