package machine

import (
	"encoding/json"
	"fmt"
	"io"
	"path/filepath"
	"strconv"
)

// Spec is what a machine is made of. Start hands it to the machine's init, which builds the root file
// system, starts the services and from then on is the machine.
type Spec struct {
	Hostname string `json:"hostname"`
	// Dir is the machine's directory on the host: upper, work, root and var in it are the machine's disk.
	Dir      string    `json:"dir"`
	Overlays []Overlay `json:"overlays,omitempty"`
	Binds    []Bind    `json:"binds,omitempty"`
	Services []Service `json:"services,omitempty"`
	// Cgroup is the group that holds every process of the machine, such as fathom/LAB/NODE.
	Cgroup string `json:"cgroup"`
	// CPUWeights say which groups get more processor time than others where all want some.
	CPUWeights []CPUWeight `json:"-"`
}

// Overlay makes a directory of the machine out of directories of the host, the uppermost first; the machine's
// writes are its own. Overlays are separate from the root's because the lower layers of one overlay must
// not lie within each other, and everything lies within the host's root.
type Overlay struct {
	Target string   `json:"target"`
	Lower  []string `json:"lower"`
}

// Bind makes a file or directory of the host visible in the machine.
type Bind struct {
	Source   string `json:"source"`
	Target   string `json:"target"`
	ReadOnly bool   `json:"readOnly,omitempty"`
}

// Service is a long-running program that init keeps running: it is started again a second after it ends.
type Service struct {
	Name string   `json:"name"`
	Args []string `json:"args"`
	Env  []string `json:"env,omitempty"`
	Log  string   `json:"log"` // path in the machine; standard output and error are appended
	// Manual services wait for a start request instead of starting with the machine.
	Manual bool `json:"manual,omitempty"`
	// After names a service that must have said that it is ready (sd_notify) before this one starts.
	After string `json:"after,omitempty"`
}

// ServiceStatus is what init knows of a service.
type ServiceStatus struct {
	Name     string `json:"name"`
	Pid      int    `json:"pid"` // in the machine's own PID namespace; 0 when it is not running
	Ready    bool   `json:"ready"`
	Restarts int    `json:"restarts"`
	LastExit string `json:"lastExit,omitempty"`
}

// Request is one line that init's control socket takes.
type Request struct {
	Op      string `json:"op"`
	Service string `json:"service,omitempty"`
}

// The operations of a Request.
const (
	OpStart    = "start"    // start the service and answer when it is ready
	OpStatus   = "status"   // answer with the state of all services
	OpPowerOff = "poweroff" // end every process cleanly, then the machine
)

// Response is init's one-line answer.
type Response struct {
	Error    string          `json:"error,omitempty"`
	Services []ServiceStatus `json:"services,omitempty"`
}

// MaxMessage bounds a request and an answer, in bytes. Whoever is root on a machine may be at either end.
const MaxMessage = 64 << 10

// DecodeRequest reads one request.
func DecodeRequest(r io.Reader) (Request, error) { return decode[Request](r) }

// DecodeResponse reads one answer.
func DecodeResponse(r io.Reader) (Response, error) { return decode[Response](r) }

func decode[M any](r io.Reader) (message M, err error) {
	limited := &io.LimitedReader{R: r, N: MaxMessage}
	if err = json.NewDecoder(limited).Decode(&message); err != nil && limited.N == 0 {
		err = fmt.Errorf("it has more than %d bytes", MaxMessage)
	}
	if err != nil {
		return *new(M), err
	}
	return message, nil
}

// ControlSocket is where init listens, as a path in the machine.
const ControlSocket = "/run/fathom-init.sock"

// The file descriptors that init inherits.
const (
	SpecFD  = 3 // the Spec as JSON, to end of file
	ReadyFD = 4 // closed after one line: "ok" or what went wrong
)

// CPUWeight gives a group of the machine Times the processor time that it would have of itself. The empty group is
// the machine, which competes with the machines beside it; any other, such as "k8s.io", is one that its services
// put processes in, and competes with those services.
type CPUWeight struct {
	Group string
	Times int
}

// Upper is the directory of the machine's disk that has what changed of the i-th of its overlays.
func (s Spec) Upper(i int) string {
	return filepath.Join(s.Dir, "overlays", strconv.Itoa(i), "upper")
}
