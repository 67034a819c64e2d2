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

// bridgeSettings say, in each network namespace, whether the rules of IP see what its bridges carry.
const bridgeSettings = "/proc/sys/net/bridge"

// LoadBridgeFilter has the kernel show packets on bridges to the rules of IP, as nodes need it: otherwise the answer
// of a pod to another one on its bridge, which came by a Service, goes around the rule that has to put the Service's
// address back. No rule or device asks for the module, so it is loaded by command. In new network namespaces it is
// at work; the calling process's own, the host's, keeps its bridges as they were.
func LoadBridgeFilter() error {
	if _, err := os.Stat(bridgeSettings); !errors.Is(err, fs.ErrNotExist) {
		return err // it is there, and the settings are somebody's
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
