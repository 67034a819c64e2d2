package image

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

func sample(source string) tree {
	t := tree{}
	t.copy("/usr/bin/program", source, 0o755)
	t.write("/etc/passwd", "root:x:0:0::/:/bin/sh\n", 0o644)
	t.link("/bin", "usr/bin")
	t.dir("/tmp", 0o777|os.ModeSticky)
	t["/capable"] = file{Source: source, Mode: 0o755, Xattrs: map[string]string{"security.capability": capNetBindService}}
	return t
}

func TestLayerIsReproducible(t *testing.T) {
	var digests []string
	for _, age := range []time.Duration{0, time.Hour} {
		source := filepath.Join(t.TempDir(), "program")
		// Neither the date of the file nor the umask it was made under may show.
		if err := os.WriteFile(source, []byte("text"), 0o600); err != nil {
			t.Fatal(err)
		}
		when := time.Now().Add(-age)
		if err := os.Chtimes(source, when, when); err != nil {
			t.Fatal(err)
		}
		l, err := writeLayer(sample(source), t.TempDir())
		if err != nil {
			t.Fatal(err)
		}
		if got := filepath.Base(l.path); got != l.hash.Hex {
			t.Errorf("blob is named %s, its digest is %s", got, l.hash.Hex)
		}
		digests = append(digests, l.hash.Hex)
	}
	if digests[0] != digests[1] {
		t.Errorf("equal trees gave the digests %v", digests)
	}
}

// What a layer says of itself is compared with what is in it.
func TestLayerIsWhatItSays(t *testing.T) {
	source := filepath.Join(t.TempDir(), "program")
	if err := os.WriteFile(source, bytes.Repeat([]byte("text that is said again "), 1<<16), 0o600); err != nil {
		t.Fatal(err)
	}
	l, err := writeLayer(sample(source), t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	var plain bytes.Buffer
	if err := sample(source).writeTo(&plain); err != nil {
		t.Fatal(err)
	}
	r, err := l.Uncompressed()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, plain.Bytes()) {
		t.Errorf("%d bytes are in the layer, want %d (%v)", len(got), plain.Len(), err)
	}
	file, err := os.ReadFile(l.path)
	if err != nil {
		t.Fatal(err)
	}
	for what, tt := range map[string]struct {
		hash v1.Hash
		of   []byte
	}{"digest": {l.hash, file}, "diffID": {l.diffID, plain.Bytes()}} {
		if want := fmt.Sprintf("sha256:%x", sha256.Sum256(tt.of)); tt.hash.String() != want {
			t.Errorf("the %s is %s, want %s", what, tt.hash, want)
		}
	}
	if int(l.size) > plain.Len()/10 {
		t.Errorf("%d bytes of one line over and over are %d in the layer", plain.Len(), l.size)
	}
}

func TestLayerEntries(t *testing.T) {
	source := filepath.Join(t.TempDir(), "program")
	if err := os.WriteFile(source, []byte("text"), 0o600); err != nil {
		t.Fatal(err)
	}
	var buffer bytes.Buffer
	if err := sample(source).writeTo(&buffer); err != nil {
		t.Fatal(err)
	}
	want := []string{
		"bin -> usr/bin 777", "capable 755 +security.capability", "etc/ 755", "etc/passwd 644",
		"tmp/ 1777", "usr/ 755", "usr/bin/ 755", "usr/bin/program 755",
	}
	var got []string
	r := tar.NewReader(&buffer)
	for {
		h, err := r.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		line := h.Name
		if h.Linkname != "" {
			line += " -> " + h.Linkname
		}
		line += " " + strings.TrimLeft(string(appendOctal(nil, h.Mode)), "0")
		for name := range h.PAXRecords {
			line += " +" + strings.TrimPrefix(name, "SCHILY.xattr.")
		}
		if h.Uid != 0 || h.Gid != 0 || h.Uname != "" || !h.ModTime.Equal(time.Unix(0, 0)) {
			t.Errorf("%s: owner %d:%d %q, date %s; want root and 1970", h.Name, h.Uid, h.Gid, h.Uname, h.ModTime)
		}
		got = append(got, line)
	}
	if strings.Join(got, "\n") != strings.Join(want, "\n") {
		t.Errorf("entries:\n%s\nwant:\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

func appendOctal(b []byte, n int64) []byte {
	if n >= 8 {
		b = appendOctal(b, n/8)
	}
	return append(b, '0'+byte(n%8))
}

func TestFingerprintSeesChanges(t *testing.T) {
	source := filepath.Join(t.TempDir(), "program")
	if err := os.WriteFile(source, []byte("text"), 0o644); err != nil {
		t.Fatal(err)
	}
	of := func(tr tree) string {
		t.Helper()
		var buffer bytes.Buffer
		if err := tr.fingerprint(&buffer); err != nil {
			t.Fatal(err)
		}
		return buffer.String()
	}
	before := of(sample(source))
	if again := of(sample(source)); again != before {
		t.Error("the same tree has two fingerprints")
	}
	for name, change := range map[string]func(tree){
		"a mode":    func(tr tree) { tr.copy("/usr/bin/program", source, 0o700) },
		"a text":    func(tr tree) { tr.write("/etc/passwd", "other", 0o644) },
		"a target":  func(tr tree) { tr.link("/bin", "sbin") },
		"one more":  func(tr tree) { tr.dir("/run", 0o755) },
		"one fewer": func(tr tree) { delete(tr, "/tmp") },
	} {
		changed := sample(source)
		change(changed)
		if of(changed) == before {
			t.Errorf("%s changed, the fingerprint did not", name)
		}
	}
	if err := os.WriteFile(source, []byte("longer text"), 0o644); err != nil {
		t.Fatal(err)
	}
	if of(sample(source)) == before {
		t.Error("the program changed, the fingerprint did not")
	}
}
