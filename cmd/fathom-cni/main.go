// Command fathom-cni attaches pods to Fathom's network. The container runtime runs it, once for each pod that comes
// or goes: see https://www.cni.dev/docs/spec and docs/design/cni.md.
package main

import (
	"fmt"
	"os"

	"github.com/fathom-network/fathom/internal/cni"
)

var version = "unknown" // set by the linker

func main() {
	if args := os.Args[1:]; cni.DeletesDevice(args) {
		if err := cni.DeleteDevice(args); err != nil {
			fmt.Fprintln(os.Stderr, "fathom-cni:", err)
			os.Exit(1)
		}
		return
	}
	if err := cni.Main(os.Stdout, "CNI plugin fathom-cni "+version); err != nil {
		if err := err.Print(); err != nil {
			fmt.Fprintln(os.Stderr, "fathom-cni: write the error:", err)
		}
		os.Exit(1)
	}
}
