#!/bin/sh
# A program that offers etcdctl among its commands has all its other commands changed: importing the package sets a switch of cobra for the
# whole process.
#
# Library:  go.etcd.io/etcd/etcdctl/v3 v3.7.3, package ctlv3, which a program imports to offer etcdctl among its commands.
# Expected: importing a package changes nothing of other packages' commands. cobra refuses `example sta`: unknown command.
# Instead:  ctlv3's init sets cobra.EnablePrefixMatching, a global variable. From then on, every cobra command of the program takes
#           any unambiguous beginning of a name for the name: `example sta` runs `example status`.
# Known:    cobra's documentation of the variable says that it "can be a dangerous thing" in tools. That ctlv3 sets it on import is
#           written nowhere.
# Means:    a multi-call program (Kubernetes' programs with etcd's in one file, as small distributions have it) that adds etcdctl makes
#           `kubectl` and `kubeadm` accept abbreviations that they refuse elsewhere. Reset the variable, or use client/v3.
#
# Needs Go; no root.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM
cd "$work"
export CGO_ENABLED=0 GOWORK=off GOFLAGS=-mod=mod

cat >main.go <<'EOF'
package main

import (
	"fmt"
	"io"

	"github.com/spf13/cobra"
)

func main() {
	root := &cobra.Command{Use: "example", SilenceUsage: true, SilenceErrors: true}
	root.AddCommand(&cobra.Command{Use: "status", Run: func(*cobra.Command, []string) { fmt.Print("runs status") }})
	root.SetOut(io.Discard)
	root.SetErr(io.Discard)
	root.SetArgs([]string{"sta"})
	if err := root.Execute(); err != nil {
		fmt.Print(err)
	}
}
EOF
cat >with.go <<'EOF'
//go:build etcdctl

package main

import _ "go.etcd.io/etcd/etcdctl/v3/ctlv3"
EOF
go mod init finding >/dev/null 2>&1
go get go.etcd.io/etcd/etcdctl/v3@v3.7.3 github.com/spf13/cobra@v1.10.2 >log 2>&1 || { cat log; exit 1; }
go build -o without . && go build -tags etcdctl -o with . || exit 1
go list -m go.etcd.io/etcd/etcdctl/v3 github.com/spf13/cobra
without=$(./without | head -n 1) with=$(./with)
echo "example sta, by itself:               $without"
echo "example sta, with etcdctl's package:  $with"
if [ "$without" = 'unknown command "sta" for "example"' ] && [ "$with" = "runs status" ]; then
	echo "as described"
else
	echo "CHANGED"
	exit 1
fi
