package image

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"
)

// squeeze compresses data in one of the formats.
func squeeze(t testing.TB, f format, data []byte) []byte {
	t.Helper()
	var buffer bytes.Buffer
	var w io.WriteCloser
	var err error
	switch f {
	case formatGzip:
		return compress(t, data)
	case formatZstd:
		w, err = zstd.NewWriter(&buffer)
	case formatXz:
		w, err = xz.NewWriter(&buffer)
	case formatBzip2: // the standard library cannot write it
		cmd := exec.Command("bzip2", "-c")
		cmd.Stdin = bytes.NewReader(data)
		out, err := cmd.Output()
		if errors.Is(err, exec.ErrNotFound) {
			t.Skip("bzip2 is not there to make an archive with")
		}
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buffer.Bytes()
}

// Archives in each format, whole and not.
func TestCompressed(t *testing.T) {
	image := testImage(t, "amd64", strings.Repeat("a text. ", 1000))
	docker := dockerArchive(t, "nginx:1", image)
	oci := ociArchive(t, map[string]string{refNameAnnotation: "v3"}, image)
	for f, suffix := range map[format]string{formatGzip: ".tar.gz", formatZstd: ".tar.zst", formatXz: ".tar.xz", formatBzip2: ".tbz2"} {
		t.Run(suffix, func(t *testing.T) {
			open := func(data []byte) (string, error) {
				t.Helper()
				file := filepath.Join(t.TempDir(), "app"+suffix)
				if err := os.WriteFile(file, data, 0o644); err != nil {
					t.Fatal(err)
				}
				a, err := openFile(t, file, "amd64")
				if err != nil {
					return "", err
				}
				return strings.Join(a.names, " "), nil
			}
			if names, err := open(squeeze(t, f, docker)); names != "docker.io/library/nginx:1" {
				t.Errorf("of docker save: %q, %v", names, err)
			}
			whole := squeeze(t, f, oci)
			if names, err := open(whole); names != "docker.io/library/app:v3" {
				t.Errorf("an OCI layout: %q, %v", names, err)
			}
			// Two halves, compressed each alone and put together, are one file in all of these formats.
			if names, err := open(append(squeeze(t, f, oci[:5000]), squeeze(t, f, oci[5000:])...)); names != "docker.io/library/app:v3" {
				t.Errorf("in two parts: %q, %v", names, err)
			}
			if _, err := open(whole[:len(whole)*2/3]); err == nil || !strings.Contains(err.Error(), "it is cut short") {
				t.Errorf("cut: %v", err)
			}
			if _, err := open(squeeze(t, f, []byte("hello"))); err == nil || !strings.Contains(err.Error(), "it is "+string(f)+", and what is inside is text") {
				t.Errorf("of a text: %v", err)
			}
			for at := 20; at < len(whole); at += len(whole)/40 + 1 {
				data := bytes.Clone(whole)
				data[at] ^= 0x55
				if _, err := open(data); err == nil {
					t.Errorf("byte %d of %d is damaged, and nothing notices", at, len(whole))
				}
			}
		})
	}
}

// A file that has the decompression hold more than a bound is refused, and not after that much is held.
func TestWindowIsBounded(t *testing.T) {
	zeros := make([]byte, 1<<20)
	t.Run("zstd", func(t *testing.T) {
		var buffer bytes.Buffer
		w, err := zstd.NewWriter(&buffer, zstd.WithWindowSize(2*maxWindow), zstd.WithEncoderConcurrency(1))
		if err != nil {
			t.Fatal(err)
		}
		for range 2*maxWindow>>20 + 1 {
			if _, err := w.Write(zeros); err != nil {
				t.Fatal(err)
			}
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		if _, err := unpack(&buffer); err == nil || !strings.Contains(err.Error(), "a window of more than 128 MiB") {
			t.Errorf("error %v, want that the window is too large", err)
		}
	})
	t.Run("xz", func(t *testing.T) {
		small := squeeze(t, formatXz, zeros)
		for bits, fits := range map[byte]bool{28: true, 30: true, 31: false, 40: false, 41: false} { // 64, 128 and 192 MiB, 4 GiB, none
			data := bytes.Clone(small)
			head := data[12 : 12+(int(data[12])+1)*4]
			if head[1] != 0 || head[2] != 0x21 || head[3] != 1 {
				t.Fatalf("the block begins with %x: this test knows another header", head)
			}
			head[4] = bits
			binary.LittleEndian.PutUint32(head[len(head)-4:], crc32.ChecksumIEEE(head[:len(head)-4]))
			in, err := newXzReader(bufio.NewReader(bytes.NewReader(data)), maxWindow)
			if err != nil {
				t.Fatal(err)
			}
			n, err := io.Copy(io.Discard, in)
			if (err == nil) != fits || fits && n != int64(len(zeros)) || bits == 40 && !errors.Is(err, errWindow) {
				t.Errorf("a window of the size %d: %d bytes, error %v", bits, n, err)
			}
		}
	})
}

// xz's own program makes what the library does not: several blocks, sizes in their headers, other checksums.
func TestXzOfOthers(t *testing.T) {
	if _, err := exec.LookPath("xz"); err != nil {
		t.Skip("xz is not there to make files with")
	}
	random := rand.New(rand.NewPCG(1, 2))
	data := make([]byte, 3<<20)
	for i := range data {
		data[i] = byte(random.IntN(4) * i >> 12)
	}
	for _, args := range []string{"-0", "-9", "-6 -T2 --block-size=500000", "-1 --check=none", "-1 --check=crc32", "-1 --check=sha256 --block-size=1000000", "-1 --lzma2=preset=1,dict=4KiB"} {
		cmd := exec.Command("xz", append(strings.Fields(args), "-c")...)
		cmd.Stdin = bytes.NewReader(data)
		packed, err := cmd.Output()
		if err != nil {
			t.Fatal(err)
		}
		packed = append(packed, make([]byte, 8)...) // padding, and another stream
		packed = append(packed, squeeze(t, formatXz, []byte("more"))...)
		in, err := newXzReader(bufio.NewReader(bytes.NewReader(packed)), maxWindow)
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(in)
		if err != nil || !bytes.Equal(got, append(bytes.Clone(data), "more"...)) {
			t.Errorf("xz %s: %d bytes of %d, error %v", args, len(got), len(data)+4, err)
		}
	}
	cmd := exec.Command("xz", "--x86", "--lzma2", "-c")
	cmd.Stdin = bytes.NewReader(data)
	packed, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	in, err := newXzReader(bufio.NewReader(bytes.NewReader(packed)), maxWindow)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadAll(in); !errors.Is(err, errXzFilter) {
		t.Errorf("with a filter for programs: error %v, want %v", err, errXzFilter)
	}
}

// FuzzXz compares with the library's own reader: where that one reads a file of small windows, so does ours, and the same.
func FuzzXz(f *testing.F) {
	for _, text := range []string{"", "text", strings.Repeat("a longer text ", 500)} {
		seed := squeeze(f, formatXz, []byte(text))
		f.Add(seed)
		f.Add(append(seed, seed...))
	}
	const most = 16 << 20
	f.Fuzz(func(t *testing.T, data []byte) {
		ours, err := newXzReader(bufio.NewReader(bytes.NewReader(data)), most)
		var got []byte
		if err == nil {
			got, err = io.ReadAll(io.LimitReader(ours, most))
		}
		if err != nil {
			return
		}
		theirs, err := xz.NewReader(bytes.NewReader(data))
		if err != nil {
			t.Fatalf("we read %d bytes, and the library says: %v", len(got), err)
		}
		want, err := io.ReadAll(io.LimitReader(theirs, most))
		if err != nil || !bytes.Equal(got, want) {
			t.Fatalf("we read %d bytes, and the library %d: %v", len(got), len(want), err)
		}
	})
}
