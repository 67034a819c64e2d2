package link

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// bridgeSettings holds the sysctls, per network namespace, that decide whether IP rules see bridged packets.
const bridgeSettings = "/proc/sys/net/bridge"

// LoadBridgeFilter makes the kernel pass bridged packets through IP rules, which nodes need: otherwise the reply of a pod
// to another pod on the same bridge, reached by a Service, bypasses the rule that translates its source back. No rule or
// device requests the module, so it is loaded by command. It applies in new network namespaces; in the calling process's
// own, the host's, bridges stay as they were.
func LoadBridgeFilter() error {
	if _, err := os.Stat(bridgeSettings); !errors.Is(err, fs.ErrNotExist) {
		return err // it is loaded, and its settings are not ours to change
	}
	if out, err := exec.Command("modprobe", "br_netfilter").CombinedOutput(); err != nil {
		return fmt.Errorf("modprobe br_netfilter: %w: %s", err, strings.TrimSpace(string(out)))
	}
	for _, family := range []string{"arptables", "iptables", "ip6tables"} {
		if err := os.WriteFile(filepath.Join(bridgeSettings, "bridge-nf-call-"+family), []byte("0"), 0o644); err != nil {
			return fmt.Errorf("keep rules off the host's bridges: %w", err)
		}
	}
	return nil
}
