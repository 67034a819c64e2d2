package saved

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/facts/topology"
	"github.com/fathom-network/fathom/internal/lab/stored"
	"github.com/fathom-network/fathom/internal/testenv"
)

// header is of a lab with one cluster of two nodes.
func header(t testing.TB) Header {
	t.Helper()
	l, err := topology.Default(topology.Overrides{Name: "net"})
	if err != nil {
		t.Fatal(err)
	}
	l.Clusters = l.Clusters[:1]
	l.Underlay4, l.Underlay6 = netip.MustParsePrefix("10.201.0.0/16"), netip.MustParsePrefix("fd00:201::/48")
	return Header{Lab: *l, Taken: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC), Kubernetes: "v1.2.3"}
}

func clusters() map[string]*Cluster {
	return map[string]*Cluster{"east": {
		State:  stored.State{KVs: []stored.KV{{Key: []byte("/registry/a"), Value: []byte("b")}}},
		Planes: map[string]stored.Disk{"east-control-plane": {Texts: map[string]string{"a.yaml": "b"}}},
	}}
}

// file writes a file with what add adds to it.
func file(t testing.TB, h Header, add func(*Writer)) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "lab.tar.zst")
	out, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	w, err := NewWriter(out, h, clusters())
	if err != nil {
		t.Fatal(err)
	}
	add(w)
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if err := out.Close(); err != nil {
		t.Fatal(err)
	}
	return name
}

func upper(s string) string { return strings.ReplaceAll(s, "10.201.", "10.99.") }

// What a node's disk has, another one has afterwards: files with their modes and owners, links, what was removed of the host's, and directories that
// hide the host's. Texts below /etc have the new addresses.
func TestDisk(t *testing.T) {
	testenv.NeedRoot(t)
	from, to := t.TempDir(), t.TempDir()
	root, lib := filepath.Join(from, "upper"), filepath.Join(from, "var")
	for _, dir := range []string{"etc/app", "var/below", "opt/mine"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for path, data := range map[string]string{
		"upper/etc/app/conf": "at 10.201.1.2\n", "upper/etc/app/binary": "10.201.1.2\x00", "upper/opt/mine/run": "10.201.1.2\n", "upper/etc/left": "x",
		"upper/var/below/nothing": "x", "var/lib/data/file": "data", "var/log/left": "x",
	} {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(from, path)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(from, path), []byte(data), 0o640); err != nil {
			t.Fatal(err)
		}
	}
	for _, err := range []error{
		os.Chown(filepath.Join(root, "opt/mine/run"), 7, 8),
		unix.Chmod(filepath.Join(root, "opt/mine/run"), 0o4755),
		os.Symlink("/etc/app/conf", filepath.Join(root, "etc/link")),
		unix.Mknod(filepath.Join(root, "etc/removed"), unix.S_IFCHR, 0),
		unix.Mkfifo(filepath.Join(lib, "pipe"), 0o600),
		unix.Setxattr(filepath.Join(root, "opt/mine"), opaque, []byte("y"), 0),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	name := file(t, header(t), func(w *Writer) {
		err := w.AddDisk("east-worker1", []Place{{"/", root}, {"/var", lib}}, true, func(path string, _ func() []byte) bool {
			return path == "/etc/left" || path == "/var/log"
		})
		if err != nil {
			t.Fatal(err)
		}
		archive, err := os.Open(filepath.Join(lib, "lib/data/file"))
		if err != nil {
			t.Fatal(err)
		}
		defer archive.Close()
		if err := w.AddImage(0, Image{Names: []string{"a:b"}, Nodes: []string{"east-worker1"}}, archive); err != nil {
			t.Fatal(err)
		}
	})
	if _, err := Check(name); err != nil {
		t.Fatal(err)
	}
	f, err := Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	want := header(t)
	want.Format = format
	if a, b := mustJSON(t, f.Header), mustJSON(t, want); a != b {
		t.Errorf("the header\n%s\nwant\n%s", a, b)
	}
	if !reflect.DeepEqual(f.Clusters, clusters()) {
		t.Errorf("the clusters %+v", f.Clusters)
	}
	places := []Place{{"/", filepath.Join(to, "upper")}, {"/var", filepath.Join(to, "var")}}
	for _, p := range places {
		if err := os.Mkdir(p.Host, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	images, err := f.Unpack(map[string]Node{"east-worker1": {places, upper}}, t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	if len(images) != 1 || images[0].Names[0] != "a:b" {
		t.Fatalf("the images %+v", images)
	}
	if data, err := os.ReadFile(images[0].Archive); err != nil || string(data) != "data" {
		t.Errorf("the archive of the image has %q: %v", data, err)
	}
	for path, want := range map[string]string{
		"upper/etc/app/conf": "at 10.99.1.2\n", "upper/etc/app/binary": "10.201.1.2\x00", "upper/opt/mine/run": "10.201.1.2\n", "var/lib/data/file": "data",
	} {
		if data, err := os.ReadFile(filepath.Join(to, path)); err != nil || string(data) != want {
			t.Errorf("%s has %q, want %q: %v", path, data, want, err)
		}
	}
	for _, path := range []string{"upper/etc/left", "upper/var/below", "var/log", "var/pipe"} {
		if _, err := os.Lstat(filepath.Join(to, path)); err == nil {
			t.Errorf("%s is there", path)
		}
	}
	if link, err := os.Readlink(filepath.Join(to, "upper/etc/link")); err != nil || link != "/etc/app/conf" {
		t.Errorf("the link leads to %q: %v", link, err)
	}
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join(to, "upper/opt/mine/run"), &st); err != nil || st.Mode&0o7777 != 0o4755 || st.Uid != 7 || st.Gid != 8 {
		t.Errorf("the program has mode %o and owner %d:%d: %v", st.Mode, st.Uid, st.Gid, err)
	}
	if err := unix.Stat(filepath.Join(to, "upper/etc/removed"), &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFCHR || st.Rdev != 0 {
		t.Errorf("what was removed has mode %o: %v", st.Mode, err)
	}
	buf := make([]byte, 8)
	if n, err := unix.Getxattr(filepath.Join(to, "upper/opt/mine"), opaque, buf); err != nil || string(buf[:n]) != "y" {
		t.Errorf("the directory does not hide the host's: %v", err)
	}
}

func mustJSON(t *testing.T, v any) string {
	t.Helper()
	data, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// Without secrets, a file with a key in it is not saved.
func TestKeyOnDisk(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "id"), []byte("-----BEGIN OPENSSH PRIVATE KEY-----\nx\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	file(t, header(t), func(w *Writer) {
		err := w.AddDisk("east-worker1", []Place{{"/root", dir}}, false, func(string, func() []byte) bool { return false })
		if !IsNotSaved(err) || !strings.Contains(err.Error(), "/root/id") {
			t.Errorf("the error is %v", err)
		}
	})
}

// A file that was cut is none.
func TestCut(t *testing.T) {
	data, err := os.ReadFile(file(t, header(t), func(*Writer) {}))
	if err != nil {
		t.Fatal(err)
	}
	cut := filepath.Join(t.TempDir(), "cut")
	for n := 0; n < len(data); n += 7 {
		if err := os.WriteFile(cut, data[:n], 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := Check(cut); !IsInvalid(err) {
			t.Errorf("%d bytes of %d: %v", n, len(data), err)
		}
	}
}

// member is one of a file that somebody made.
type member struct {
	tar.Header
	data string
}

func made(t testing.TB, members []member) string {
	t.Helper()
	var out bytes.Buffer
	zip, err := zstd.NewWriter(&out)
	if err != nil {
		t.Fatal(err)
	}
	w := tar.NewWriter(zip)
	for _, m := range members {
		if m.Typeflag == 0 {
			m.Typeflag = tar.TypeReg
		}
		m.Size = int64(len(m.data))
		if err := w.WriteHeader(&m.Header); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte(m.data)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if err := zip.Close(); err != nil {
		t.Fatal(err)
	}
	name := filepath.Join(t.TempDir(), "made")
	if err := os.WriteFile(name, out.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	return name
}

// What a file says is bound to the disks of the lab's own nodes, and to what a disk has.
func TestBound(t *testing.T) {
	testenv.NeedRoot(t)
	h := header(t)
	h.Format = format
	head := member{tar.Header{Name: headerName}, mustJSON(t, h)}
	east := member{tar.Header{Name: clustersDir + "east.json"}, mustJSON(t, clusters()["east"])}
	outside := t.TempDir()
	node := func(path string, kind byte, link string) member {
		return member{tar.Header{Name: nodesDir + "east-worker1" + path, Typeflag: kind, Linkname: link, Devmajor: 1, Devminor: 5}, ""}
	}
	other, noPlane := h, clusters()["east"]
	other.Format = format + 1
	noPlane.Planes = nil
	for name, members := range map[string][]member{
		"nothing":                {},
		"no header":              {east, head},
		"another format":         {{tar.Header{Name: headerName}, mustJSON(t, other)}, east},
		"a header of no lab":     {{tar.Header{Name: headerName}, `{"Format":1}`}, east},
		"no cluster":             {head},
		"no control plane":       {head, {tar.Header{Name: clustersDir + "east.json"}, mustJSON(t, noPlane)}},
		"a strange member":       {head, east, {tar.Header{Name: "else"}, "x"}},
		"a strange node":         {head, east, {tar.Header{Name: nodesDir + "../x"}, "x"}},
		"a path that climbs":     {head, east, node("/../../x", tar.TypeReg, "")},
		"a link that leaves":     {head, east, node("/out", tar.TypeSymlink, outside), node("/out/x", tar.TypeReg, "")},
		"a link that climbs":     {head, east, node("/out", tar.TypeSymlink, "../../../../../../../../.."+outside), node("/out/x", tar.TypeReg, "")},
		"a device":               {head, east, node("/dev0", tar.TypeChar, "")},
		"a hard link":            {head, east, node("/hard", tar.TypeLink, "/etc/passwd")},
		"an image of no node":    {head, east, {tar.Header{Name: imagesDir + "0.json"}, `{"Names":["a"],"Nodes":["b"]}`}},
		"an archive of no image": {head, east, {tar.Header{Name: imagesDir + "0.tar"}, "x"}},
		"an image of no archive": {head, east, {tar.Header{Name: imagesDir + "0.json"}, `{"Names":["a"]}`}},
	} {
		places := []Place{{"/", t.TempDir()}}
		f, err := Open(made(t, members))
		if err == nil {
			_, err = f.Unpack(map[string]Node{"east-worker1": {places, upper}}, t.TempDir())
			f.Close()
		}
		if err == nil {
			t.Errorf("%s is no error", name)
		}
		if left, err := os.ReadDir(outside); err != nil || len(left) > 0 {
			t.Fatalf("%s: %v is outside of the disk: %v", name, left, err)
		}
	}
}

func FuzzOpen(f *testing.F) {
	data, err := os.ReadFile(file(f, header(f), func(w *Writer) {
		_ = w.AddDisk("east-worker1", []Place{{"/var", "testdata"}}, true, func(string, func() []byte) bool { return false })
	}))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data)
	f.Fuzz(func(t *testing.T, data []byte) {
		name := filepath.Join(t.TempDir(), "fuzzed")
		if err := os.WriteFile(name, data, 0o600); err != nil {
			t.Fatal(err)
		}
		file, err := Open(name)
		if err != nil {
			return
		}
		defer file.Close()
		_, _ = file.Unpack(map[string]Node{"east-worker1": {[]Place{{"/", t.TempDir()}}, upper}}, t.TempDir())
	})
}
