#!/bin/sh
# `ctr images export` ends with success before the end of its archive has been written.
#
# Library:  github.com/containerd/containerd/v2 v2.4.2: cmd/ctr, and client.Transfer with core/transfer/archive.ImageExportStream.
# Expected: When the command has ended with 0, or Transfer has returned without an error, the archive is whole.
# Instead:  Transfer returns when the server says that it has sent everything. What came of it is written by a goroutine that
#           ImageExportStream.MarshalAny starts and nobody waits for; with ctr, that goroutine ends with the program. What is
#           missing is what the reader of a pipe, or a slow disk, had not taken yet: up to 64 KiB and what is on its way.
# Known:    as a flake of programs that call `ctr images export` (devantler-tech/ksail#6488 took it for missing content), and of
#           its sister: containerd/containerd#13625 is the same of progress events. Export by the transfer service is the default
#           of ctr since containerd 2.0.
# Means:    `ctr images export --local` reads the blobs itself and writes before it ends. A program that uses the client's
#           Transfer has to wait until the writer that it gave has been closed, which is the goroutine's last act.
#
# Needs Go and root. Its containerd listens in a temporary directory alone.
set -eu
[ "$(id -u)" = 0 ] || { echo "not shown: containerd needs root"; exit 2; }
work=$(mktemp -d)
pid=
trap '[ -z "$pid" ] || { kill "$pid"; wait "$pid" || :; }; rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM
cd "$work"
export CGO_ENABLED=0 GOWORK=off GOFLAGS=-mod=mod

cat >main.go <<'EOT'
// With `image`, it writes an archive of an image of one layer of 1 MiB. With `take`, it reads an archive of it slowly, and says
// how much of the layer was there.
package main

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"time"
)

var layer = func() []byte {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	check(w.WriteHeader(&tar.Header{Name: "file", Mode: 0o644, Size: 1 << 20}))
	_, err := w.Write(bytes.Repeat([]byte("containerd "), 1<<20)[:1<<20])
	check(err)
	check(w.Close())
	return b.Bytes()
}()

func check(err error) {
	if err != nil {
		fmt.Println("not shown:", err)
		os.Exit(2)
	}
}

func digest(b []byte) string { return fmt.Sprintf("%x", sha256.Sum256(b)) }

func write() {
	w := tar.NewWriter(os.Stdout)
	add := func(name string, data []byte) {
		check(w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(data))}))
		_, err := w.Write(data)
		check(err)
	}
	blob := func(kind string, data []byte) string {
		add("blobs/sha256/"+digest(data), data)
		return fmt.Sprintf(`{"mediaType":"application/vnd.oci.image.%s","digest":"sha256:%s","size":%d`, kind, digest(data), len(data))
	}
	l := blob("layer.v1.tar", layer) + "}"
	c := blob("config.v1+json", []byte(fmt.Sprintf(`{"architecture":"amd64","os":"linux","config":{},"rootfs":{"type":"layers","diff_ids":["sha256:%s"]}}`, digest(layer)))) + "}"
	m := blob("manifest.v1+json", []byte(fmt.Sprintf(`{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":%s,"layers":[%s]}`, c, l)))
	add("index.json", []byte(fmt.Sprintf(`{"schemaVersion":2,"manifests":[%s,"annotations":{"io.containerd.image.name":"example.com/app:1"}}]}`, m)))
	add("oci-layout", []byte(`{"imageLayoutVersion":"1.0.0"}`))
	check(w.Close())
}

// slow reads 32 KiB in 10 ms.
type slow struct{ from io.Reader }

func (s slow) Read(p []byte) (int, error) {
	time.Sleep(10 * time.Millisecond)
	return s.from.Read(p[:min(len(p), 32<<10)])
}

func take() {
	r := tar.NewReader(slow{os.Stdin})
	got := int64(0)
	for {
		h, err := r.Next()
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			break
		}
		check(err)
		if path.Base(h.Name) == digest(layer) {
			got, _ = io.Copy(io.Discard, r)
		}
	}
	fmt.Printf("%d of %d bytes of the layer", got, len(layer))
	if got < int64(len(layer)) {
		fmt.Print(": cut")
	}
	fmt.Println()
}

func main() {
	switch os.Args[1] {
	case "image":
		write()
	case "take":
		take()
	}
}
EOT
go mod init finding >/dev/null 2>&1
go get github.com/containerd/containerd/v2/cmd/ctr@v2.4.2 github.com/containerd/containerd/v2/cmd/containerd@v2.4.2 >log 2>&1 || { cat log; exit 2; }
go build -o . . github.com/containerd/containerd/v2/cmd/ctr github.com/containerd/containerd/v2/cmd/containerd >log 2>&1 || { cat log; exit 2; }
go list -m github.com/containerd/containerd/v2

cat >config.toml <<EOF
version = 3
root = "$work/root"
state = "$work/state"
disabled_plugins = ["io.containerd.cri.v1.runtime", "io.containerd.cri.v1.images", "io.containerd.grpc.v1.cri", "io.containerd.nri.v1.nri"]
[grpc]
address = "$work/containerd.sock"
[ttrpc]
address = "$work/containerd.sock.ttrpc"
EOF
./containerd --config config.toml >containerd.log 2>&1 &
pid=$!
ctr() { ./ctr --address "$work/containerd.sock" "$@"; }
tries=0
until ctr version >/dev/null 2>&1; do
	tries=$((tries + 1))
	[ $tries -lt 300 ] && kill -0 "$pid" || { cat containerd.log; echo "not shown: containerd does not answer"; exit 2; }
	sleep 0.1
done
./finding image >image.tar
ctr images import --local --no-unpack --platform linux/amd64 image.tar >log 2>&1 || { cat log; exit 2; }

export_by() { { ctr images export --platform linux/amd64 "$@" - example.com/app:1 2>problems; echo $? >code; } | ./finding take; }
changed=
for by in "" --local; do
	# shellcheck disable=SC2086
	said=$(export_by $by)
	echo "ctr images export ${by:-         }  exit code $(cat code), $said"
	case "$by $(cat code) $said" in
	" 0 "*cut | "--local 0 "*layer) ;;
	*) cat problems; changed=1 ;;
	esac
done
[ -z "$changed" ] || { echo CHANGED; exit 1; }
echo "as described"
